"""A contact sheet shows documents as they are stored."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nextflow.datamodules.contact_sheet import ContactSheetConfig, draw_contact_sheet
from nextflow.sequence.shards import ShardHeader, ShardWriter


def test_pictures_and_texts_stand_in_order_and_what_is_given_on_grey(tmp_path):
    Image.new("RGB", (32, 16), "red").save(tmp_path / "red.png")
    segments = [
        {"image": "0.png", "loss": False},
        {"text": "a rather long question about it?", "loss": False},
        {"text": "red"},
    ]
    with ShardWriter(tmp_path / "train", header=ShardHeader(kind="documents")) as writer:
        writer.write("a", {"segments": segments}, {"0.png": (tmp_path / "red.png").read_bytes()})
    config = ContactSheetConfig(shards=[str(tmp_path / "train/*.tar")], output="", side=32)
    pixels_HWC = np.asarray(draw_contact_sheet(config))
    middle_W3 = pixels_HWC[20]
    red = np.flatnonzero((middle_W3 == (255, 0, 0)).all(axis=1))
    assert len(red) == 64 and red.max() - red.min() == 63  # twice as wide as high, as it is stored
    given, learnt = ((pixels_HWC == value).all(axis=(0, 2)) for value in (0xDD, 0xFF))
    columns = [np.flatnonzero((pixels_HWC[36] == value).all(axis=1)) for value in (0xDD, 0xFF)]
    assert columns[0].size and columns[1].size and columns[0].max() < columns[1].min()
    assert not (given & learnt).any()


def test_the_command_writes_it_and_refuses_codes(shapes, tmp_path):
    command = [sys.executable, "-m", "nextflow.datamodules.contact_sheet", "--output", "out/sheet.png", "--shards"]

    def call(pattern):
        return subprocess.run([*command, f"[{pattern}]"], cwd=tmp_path, capture_output=True, text=True)

    drawn = call(shapes.documents["train"])
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.startswith("out/sheet.png: ") and Image.open(tmp_path / "out/sheet.png").size[0] > 64
    refused = call(shapes.codes["train"].replace("{level}", "32"))
    assert refused.returncode == 1 and "holds codes; draw the documents that it was made of" in refused.stderr
    with pytest.raises(FileNotFoundError, match="shards: no file matches"):
        draw_contact_sheet(ContactSheetConfig(shards=[str(tmp_path / "none/*.tar")], output=""))
