"""A summary is made from whatever a run has left, and says what is missing."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from nextflow.evaluation.drawings import load_drawings
from nextflow.evaluation.summary import summarize


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path):
    """Twenty training and eight compositional drawings; pictures are the drawings, but for one that is another drawing."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 16, 16, 3), dtype=np.uint8)
    names = [("train", f"T{index}") for index in range(20)] + [("compositional", f"C{index}") for index in range(8)]
    for split in ("train", "compositional"):
        (tmp_path / "data" / split).mkdir(parents=True)
        with tarfile.open(tmp_path / "data" / split / "000000.tar", "w") as tar:
            files = [("_header.json", b'{"kind": "documents"}')]
            for (part, key), picture in zip(names, pixels):
                if part == split:
                    record = {"segments": [{"text": f"drawing {key}"}, {"image": "0.png"}], "source": "test"}
                    files += [(f"{key}.json", json.dumps(record).encode()), (f"{key}.0.png", png(picture))]
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "generate").mkdir()
    lines = []
    for index, ((_, key), picture) in enumerate(zip(names, pixels)):
        shown = pixels[5] if key == "C0" else picture
        (tmp_path / "generate" / f"{index:05d}.png").write_bytes(png(shown))
        # Half of the lines know no key: their drawing is found by the caption.
        line = {"file": f"{index:05d}.png", "prompt": f"drawing {key}", "key": key if index % 2 else "", "seed": 0}
        lines.append(json.dumps(line))
    (tmp_path / "generate" / "samples.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_drawings_of_all_splits_are_read_without_the_header(run):
    drawings = load_drawings(run / "data")
    assert len(drawings) == 28
    assert drawings[20].key == "C0" and drawings[20].split == "compositional" and drawings[20].caption == "drawing C0"


def test_retrieval_is_reported_for_each_split_apart(run):
    results = summarize(run)
    assert results["retrieval"]["train"]["rank_1"]["value"] == 1.0
    assert results["retrieval"]["compositional"]["rank_1"]["hits"] == 7
    assert results["missing"] == ["reconstruct/samples.jsonl", "caption/captions.jsonl", "timing.json"]
    # 12 training and 6 compositional rows of 4 columns
    assert Image.open(run / "results.png").size == (4 * 140, 21 + 18 * 140)


def test_everything_that_is_there_enters_the_table(run):
    (run / "reconstruct").mkdir()
    (run / "reconstruct/00000.png").write_bytes((run / "generate/00003.png").read_bytes())
    (run / "reconstruct/samples.jsonl").write_text('{"file": "00000.png", "key": "T3", "prompt": "drawing T3"}\n')
    (run / "caption").mkdir()
    captions = [
        {"key": "T1", "reference": "drawing T1", "caption": "drawing T1"},
        {"key": "C1", "reference": "drawing C1", "caption": "drawing"},
    ]
    (run / "caption/captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    (run / "transformer/logs").mkdir(parents=True)
    (run / "transformer/metrics.json").write_text('{"val/loss_image/scale_01": 1.25, "fit/seconds": 9.0}')
    (run / "tokenizer_pixel/version_0").mkdir(parents=True)
    (run / "tokenizer_pixel/version_0/metrics.csv").write_text("step,val/psnr,val/ssim\n1,20.0,\n2,21.5,\n2,,0.9\n")
    (run / "timing.json").write_text('{"tokenizer_pixel": 90, "transformer": 30}')
    results = summarize(run)
    assert results["missing"] == []
    assert results["captions"]["train"]["exact"]["value"] == 1.0
    assert results["captions"]["compositional"]["token_f1"] == pytest.approx(2 / 3)
    assert results["metrics"]["tokenizer_pixel"] == {"val/psnr": 21.5, "val/ssim": 0.9}
    table = (run / "results.md").read_text()
    assert (
        "| transformer val | 1.25 |" in table
        and "| tokenizer_pixel | 21.5 | 0.9 |" in table
        and "| sum | 2.0 |" in table
    )
    assert json.loads((run / "results.json").read_text())["minutes"] == {"tokenizer_pixel": 1.5, "transformer": 0.5}


def test_a_run_without_data_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="make the data set first"):
        summarize(tmp_path)
