"""Images without captions from any folder: training, evaluation, and `predict`, with no shards to be made first.

    photos/cat.jpg            key "cat"
    photos/2024/a dog.png     key "2024/a-dog-6289e916"     what a shard's key may not hold is replaced, a hash keeps keys apart

All files of a split behave as one shard: order, resuming, workers, ranks and broken files are the business of `base.py`.

Training is in buckets of level and ratio, as of `ImageDataModule`. Evaluation and `predict` may see each image at its own size
(`resolution: native`): only what the stride asks for is padded or cut, and images of equal size are batched together.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from nextflow.datamodules.base import Recipe
from nextflow.datamodules.images import Bucket, Buckets, ImageDataModule, LoadedImage
from nextflow.datamodules.pixels import ImageCache, fit_image
from nextflow.datamodules.streams import Sample, ShardFolder
from nextflow.sequence.native import Fit, fit_to_stride
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import Shard, ShardHeader

# Formats that Pillow names but reads only with a program of their own, or not at all.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
IMAGE = "0.png"
# Longer names do not fit the tar format of shards.
LONGEST_NAME = 80


class ImageFolderDataModule(ImageDataModule):
    """Images without captions from folders."""

    shards_key = "folders"

    def __init__(
        self,
        *,
        folders: Mapping[str, str],
        levels: list[int] | None = None,
        batch_size: int = 64,
        schedule: ScaleSchedule = ScaleSchedule(),  # noqa: B008 (frozen)
        resolution: Literal["buckets", "native"] = "buckets",
        fit: Fit = "pad",
        max_pixels: int | None = None,
        horizontal_flip: bool = False,
        min_crop_scale: float = 1.0,
        batches_per_epoch: int | None = None,
        validation_splits: list[str] = ["validation"],  # noqa: B006 (jsonargparse copies)
        test_splits: list[str] = ["validation"],  # noqa: B006
        predict_splits: list[str] | None = None,
        cache_megabytes: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
    ):
        """
        Args:
            folders: split -> folder (with all folders in it), or glob pattern of image files.
            levels: levels to train at (drawn per image) and to evaluate and predict at (each in turn); all of the
                schedule if not given.
            batch_size: images per batch and device.
            schedule: scale schedule, with the base grids that are the buckets.
            resolution: how evaluation and `predict` see images: in the buckets of training, or each at its own size.
            fit: whether native sides that are no multiple of the stride are padded (right, below) or cut (around the centre).
            max_pixels: images with more pixels are scaled down to this many before they are seen at native size.
            horizontal_flip: mirror half of the training images.
            min_crop_scale: training images are cut to a random part whose sides are at least this fraction; 1 cuts nothing.
            batches_per_epoch: training batches of an epoch; one pass over the data if not given.
            validation_splits: splits of validation.
            test_splits: splits of `test`.
            predict_splits: splits of `predict`; all of `folders` if not given.
            cache_megabytes: memory for decoded images, per process.
            num_workers: loader processes.
            seed: of order and augmentation.
            max_bad_fraction: stop when more images than this cannot be read.
        """
        super().__init__(
            shards=folders,
            levels=list(schedule.levels) if levels is None else levels,
            batch_size=batch_size,
            schedule=schedule,
            horizontal_flip=horizontal_flip,
            min_crop_scale=min_crop_scale,
            batches_per_epoch=batches_per_epoch,
            validation_splits=validation_splits,
            test_splits=test_splits,
            predict_splits=predict_splits,
            window_shards=1,
            cache_megabytes=cache_megabytes,
            num_workers=num_workers,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
        )
        if max_pixels is not None and max_pixels < schedule.stride**2:
            raise ValueError(f"data.max_pixels must be at least one cell, {schedule.stride**2}, not {max_pixels}")
        self.resolution = resolution
        self.fit: Fit = fit
        self.max_pixels = max_pixels
        self.open = ShardFolder(opener=ImageFolder)

    def evaluation_recipes(self, split: str, predict: bool) -> list[tuple[Recipe, str]]:
        if self.resolution == "buckets":
            return super().evaluation_recipes(split, predict)
        recipe = _NativeRecipe(
            batch_size=self.batch_size,
            schedule=self.schedule,
            split=split,
            cache=self.cache,
            fit=self.fit,
            max_pixels=self.max_pixels,
        )
        return [(recipe, self.pattern(split))]

    def paths(self, split: str, pattern: str) -> list[Path]:
        """The pattern itself, which `ImageFolder` opens as one shard."""
        if not self.open(Path(pattern)).keys:
            raise FileNotFoundError(
                f"data.{self.shards_key}.{split}: there are no images at {pattern!r}. "
                "Give a folder that holds some, or a glob pattern of image files."
            )
        return [Path(pattern)]

    def source_files(self, split: str) -> list[Path]:
        """The image files of a split."""
        return find_images(self.pattern(split))


class ImageFolder(Shard):
    """Image files that read like a shard of documents with one image each."""

    def __init__(self, pattern: Path):
        """
        Args:
            pattern: a folder, or a glob pattern of image files; without images there are no samples.
        """
        self.root = _root(str(pattern))
        self._names: dict[str, str] = {}
        for path in find_images(str(pattern)):
            name = path.relative_to(self.root).as_posix()
            key = shard_safe_key(name)
            self._names[_with_hash(key, name) if key in self._names else key] = name  # a.png may stand beside a.jpg
        super().__init__(pattern, ShardHeader(kind="documents"), {key: {IMAGE: (0, 0)} for key in self._names})

    def read(self, key: str, name: str) -> bytes:
        """The image file, whatever its format; `name` is that of the record."""
        return (self.root / self._names[key]).read_bytes()

    def record(self, key: str) -> dict[str, Any]:
        """A document of the image alone."""
        return {"segments": [{"image": IMAGE}], "source": "folder", "metadata": {"file": self._names[key]}}


def find_images(pattern: str) -> list[Path]:
    """The image files below a folder or of a glob pattern, sorted; hidden ones and other formats than Pillow's are left out."""
    if Path(pattern).exists():  # a bracket in an existing name is no pattern
        pattern = f"{escape(pattern)}/**" if Path(pattern).is_dir() else escape(pattern)
    found = (Path(path) for path in sorted(glob(pattern, recursive=True)))
    return [path for path in found if path.suffix.lower() in _extensions() and path.is_file()]


def shard_safe_key(path: str) -> str:
    """Key of an image file: its path without extension; where a shard refuses that as a key, made so and given a hash."""
    stem = path[: len(path) - len(Path(path).suffix)]
    safe = re.sub(r"[^A-Za-z0-9_/-]", "-", stem).lstrip("_")[-LONGEST_NAME:].strip("/")
    return safe if safe == stem else _with_hash(safe, path)


@dataclass(frozen=True, kw_only=True)
class _NativeRecipe:
    batch_size: int
    schedule: ScaleSchedule
    split: str
    cache: ImageCache
    fit: Fit
    max_pixels: int | None

    def read(self, sample: Sample) -> LoadedImage:
        image = self.cache.read(sample, IMAGE)
        if self.max_pixels is None or image.width * image.height <= self.max_pixels:
            image_CHW = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
        else:
            factor = (self.max_pixels / (image.width * image.height)) ** 0.5
            image_CHW = fit_image(image, (max(1, int(image.height * factor)), max(1, int(image.width * factor))))
        fitted_CHW = fit_to_stride(image_CHW, self.schedule.stride, self.fit)
        (height, width), (fitted_height, fitted_width) = image_CHW.shape[1:], fitted_CHW.shape[1:]
        padded = fitted_height > height or fitted_width > width
        bucket = Bucket(
            self.schedule.nearest_level(fitted_height, fitted_width),
            fitted_height / fitted_width,
            self.schedule.native_grids(fitted_height, fitted_width),
            (height, width) if padded else None,
        )
        return LoadedImage(bucket, fitted_CHW, sample, IMAGE, sample.shard.record(sample.key))

    def assembler(self) -> Buckets:
        return Buckets(self.batch_size, self.split)


@lru_cache(maxsize=1)
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()  # loads all of Pillow's formats
    return frozenset(end for end, name in known.items() if name in Image.OPEN and name not in NOT_READ)


def _root(pattern: str) -> Path:
    """The last folder of a pattern that is named outright."""
    if Path(pattern).exists():
        return Path(pattern) if Path(pattern).is_dir() else Path(pattern).parent
    parts = Path(pattern).parts
    first_magic = next((number for number, part in enumerate(parts) if has_magic(part)), len(parts) - 1)
    return Path(*parts[:first_magic])


def _with_hash(key: str, path: str) -> str:
    return f"{key}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
