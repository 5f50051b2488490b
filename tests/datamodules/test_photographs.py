"""The photographs of installed packages, really cut: splits by photograph, crops of them, licences, and the second run."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nextflow.datamodules import photographs
from nextflow.datamodules.image_folder import ImageFolderDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.photographs import PHOTOGRAPHS, PhotographsConfig, make_photographs
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import open_shard

SCHEDULE = ScaleSchedule(sides=tuple(range(1, 9)), levels={32: 4, 64: 8}, stride=8)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    make_photographs(PhotographsConfig(output=str(folder), train_crops=3, validation_crops=2))
    return folder


def test_a_photograph_is_in_one_split(output):
    report = json.loads((output / "report.json").read_text())
    assert report["splits"] == {"train": 3 * 7, "validation": 2 * 2}
    held_out = {photograph.name for photograph in PHOTOGRAPHS if photograph.split == "validation"}
    for split in ("train", "validation"):
        shard = open_shard(output / split / "000000.tar")
        shown = {shard.record(key)["metadata"]["photograph"] for key in shard.keys}
        assert shown == {path.stem for path in (output / "whole" / split).iterdir()}
        assert shown & held_out == (held_out if split == "validation" else set())


def test_crops_are_squares_of_their_photograph(output):
    whole = {path.stem: Image.open(path).convert("RGB") for path in (output / "whole").glob("*/*")}
    shard = open_shard(output / "train" / "000000.tar")
    sides = []
    for key in shard.keys:
        details = shard.record(key)["metadata"]
        left, top, right, bottom = details["box"]
        photograph = whole[details["photograph"]]
        assert 0 <= left < right <= photograph.width and 0 <= top < bottom <= photograph.height
        assert right - left == pytest.approx(bottom - top, abs=0.03) and right - left >= 63.9
        crop = Image.open(io.BytesIO(shard.read(key, "0.png")))
        expected = photograph.resize((64, 64), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        assert np.abs(np.asarray(crop, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2  # the box is rounded
        sides.append((right - left) / min(photograph.size))
    assert min(sides) < 0.3 and max(sides) > 0.7


def test_sources_and_licences_travel_with_the_crops(output):
    text = (output / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    for photograph in PHOTOGRAPHS:
        assert photograph.source in text and photograph.licence in text
        header = open_shard(output / photograph.split / "000000.tar").header
        assert photograph.source in header.text


def test_crops_and_whole_photographs_are_read(output):
    crops = ImageDataModule(
        shards={split: f"{output}/{split}/*.tar" for split in ("train", "validation")}, levels=[32, 64],
        schedule=SCHEDULE, batch_size=4,
    )  # fmt: skip
    assert {batch.images.shape[2:] for batch in crops.val_dataloader()} == {(32, 32), (64, 64)}
    whole = ImageFolderDataModule(
        folders={"validation": f"{output}/whole/validation"}, schedule=SCHEDULE, resolution="native", batch_size=4
    )
    found = {batch.keys[0]: (tuple(batch.images.shape[2:]), batch.valid_size) for batch in whole.val_dataloader()}
    assert found == {"chelsea": ((304, 456), (300, 451)), "china": ((432, 640), (427, 640))}


def test_a_finished_output_is_kept_and_made_anew_to_the_same_bytes(output):
    config = PhotographsConfig(output=str(output), train_crops=3, validation_crops=2)
    shard = output / "train" / "000000.tar"
    stamp, data = shard.stat().st_mtime_ns, shard.read_bytes()
    report = make_photographs(config)
    assert shard.stat().st_mtime_ns == stamp
    (output / "report.json").unlink()
    (output / "train" / "000001.tar.partial").write_bytes(b"half")
    assert make_photographs(config) == report
    assert shard.read_bytes() == data and [path.name for path in shard.parent.iterdir()] == ["000000.tar"]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="size 400 is larger than the photograph chelsea"):
        make_photographs(PhotographsConfig(output=str(tmp_path), size=400, train_crops=1))
    with pytest.raises(ValueError, match="train_crops"):
        make_photographs(PhotographsConfig(output=str(tmp_path), train_crops=0))
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e \'\.\[photographs\]\'"):
        make_photographs(PhotographsConfig(output=str(tmp_path)))


def test_the_command_reads_a_config(output, tmp_path):
    (tmp_path / "data.yaml").write_text(f"output: {output}\ntrain_crops: 3\nvalidation_crops: 2\n")
    command = [sys.executable, "-m", "nextflow.datamodules.photographs", "--config", str(tmp_path / "data.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "21 train, 4 validation crops of 9 photographs" in done.stdout
