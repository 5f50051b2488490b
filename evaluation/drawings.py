"""Reading document shards for evaluation: each split's pictures with their captions (layout of the tars: docs/data.md)."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "compositional")
"""Folders of a data set, in the order of its tables."""


class Drawing(NamedTuple):
    """One picture of a data set."""

    key: str
    split: str
    caption: str
    """The texts of its document, joined."""
    pixels_HWC: np.ndarray
    """uint8"""


def load_drawings(data: str | Path) -> list[Drawing]:
    """The first picture of every document of all splits below the folder `data`.

    Raises FileNotFoundError when there is no shard.
    """
    drawings = []
    for split in SPLITS:
        for path in sorted((Path(data) / split).glob("*.tar")):
            drawings.extend(_read_shard(path, split))
    if not drawings:
        raise FileNotFoundError(f"no shards such as {Path(data) / SPLITS[0] / '000000.tar'}: make the data set first")
    return drawings


def caption_of(record: dict) -> str:
    """The texts of a document record (KEY.json), joined by spaces."""
    return " ".join(segment["text"].strip() for segment in record.get("segments", ()) if "text" in segment)


def read_picture(path: str | Path) -> np.ndarray:
    """A picture file as uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _read_shard(path: Path, split: str) -> list[Drawing]:
    records: dict[str, dict] = {}
    pictures: dict[tuple[str, str | None], bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            if key.startswith("_") or not member.isfile():
                continue  # the header
            content = tar.extractfile(member).read()  # type: ignore[union-attr]  # a file, as just checked
            if name == "json":
                records[key] = json.loads(content)
            else:
                pictures[key, name] = content
    drawings = []
    for key, record in records.items():
        first = next((segment["image"] for segment in record["segments"] if "image" in segment), None)
        if (key, first) in pictures:
            pixels_HWC = read_picture(io.BytesIO(pictures[key, first]))  # type: ignore[arg-type]
            drawings.append(Drawing(key, split, caption_of(record), pixels_HWC))
    return drawings
