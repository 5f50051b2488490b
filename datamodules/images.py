"""Images with captions, for the image tokenizer: training, evaluation, and extraction of codes by `predict`.

A batch is one bucket: one level and one base grid. The bucket of an image is the base grid nearest to its ratio; the image is
scaled with antialiasing until it covers the bucket's pixels, and cut to them around its centre.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nextflow.datamodules.base import Recipe, ShardDataModule, Stage
from nextflow.datamodules.batches import ImageBatch
from nextflow.datamodules.pixels import ImageCache, crop_box, fit_image
from nextflow.datamodules.streams import BROKEN, Read, Sample
from nextflow.sequence.scales import Grid, ScaleSchedule


class ImageDataModule(ShardDataModule):
    """Images with captions from document shards."""

    def __init__(
        self,
        *,
        shards: Mapping[str, str],
        levels: list[int],
        batch_size: int = 64,
        schedule: ScaleSchedule = ScaleSchedule(),  # noqa: B008 (frozen)
        horizontal_flip: bool = False,
        min_crop_scale: float = 1.0,
        batches_per_epoch: int | None = None,
        validation_splits: list[str] = ["validation"],  # noqa: B006 (jsonargparse copies)
        test_splits: list[str] = ["validation"],  # noqa: B006
        predict_splits: list[str] | None = None,
        window_shards: int = 16,
        cache_megabytes: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
    ):
        """
        Args:
            shards: split -> glob pattern of document shards.
            levels: levels to train at (drawn per image) and to evaluate and predict at (each in turn).
            batch_size: images per batch and device.
            schedule: scale schedule, with the base grids that are the buckets.
            horizontal_flip: mirror half of the training images. Off: captions speak of left and right.
            min_crop_scale: training images are cut to a random part whose sides are at least this fraction; 1 cuts nothing.
            batches_per_epoch: training batches of an epoch; one pass over the data if not given.
            validation_splits: splits of validation.
            test_splits: splits of `test`.
            predict_splits: splits of `predict`; all of `shards` if not given.
            window_shards: shards that are shuffled together.
            cache_megabytes: memory for decoded images, per process.
            num_workers: loader processes.
            seed: of order and augmentation.
            max_bad_fraction: stop when more samples than this cannot be read.
        """
        super().__init__(
            shards=shards,
            schedule=schedule,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            validation_splits=validation_splits,
            test_splits=test_splits,
            predict_splits=predict_splits,
            window_shards=window_shards,
            num_workers=num_workers,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
        )
        for level in levels:
            schedule.num_scales(level)
        if not levels:
            raise ValueError("data.levels is empty: name at least one level of the schedule")
        if not 0 < min_crop_scale <= 1:
            raise ValueError(f"data.min_crop_scale must lie in (0, 1], not {min_crop_scale}")
        self.levels = list(levels)
        self.horizontal_flip = horizontal_flip
        self.min_crop_scale = min_crop_scale
        self.cache = ImageCache(cache_megabytes)

    def training_recipe(self, stage: Stage | None) -> tuple[Recipe, str, int]:
        pattern = self.pattern("train")
        paths = self.paths("train", pattern)
        levels = self.levels if stage is None else [stage.level]
        batch_size = self.batch_size if stage is None or stage.batch_size is None else stage.batch_size
        if stage is not None:
            num_batches = stage.num_batches
        elif self.batches_per_epoch is not None:
            num_batches = self.batches_per_epoch
        else:
            num_samples = sum(len(self.open(path)) for path in paths)
            num_batches = max(1, num_samples // (batch_size * self.rank[1]))
        recipe = _ImageRecipe(
            levels=tuple(levels),
            batch_size=batch_size,
            schedule=self.schedule,
            split="train",
            cache=self.cache,
            seed=self.seed,
            horizontal_flip=self.horizontal_flip,
            min_crop_scale=self.min_crop_scale,
        )
        return recipe, pattern, num_batches

    @staticmethod
    def pieces(sample: Sample) -> list[Sample]:
        """One for each image of the document."""
        try:
            count = len(image_names(sample.shard.record(sample.key)))
        except BROKEN:
            count = 1  # reading it will say what is wrong
        return [sample._replace(part=part) for part in range(count)]

    def evaluation_recipes(self, split: str, predict: bool) -> list[tuple[Recipe, str]]:
        return [
            (
                _ImageRecipe(
                    levels=(level,), batch_size=self.batch_size, schedule=self.schedule, split=split, cache=self.cache
                ),
                self.pattern(split),
            )
            for level in self.levels
        ]


def image_names(record: dict[str, Any]) -> list[str]:
    """Files of the images of a document, in order."""
    return [segment["image"] for segment in record["segments"] if "image" in segment]


def caption_of(record: dict[str, Any]) -> str:
    """All texts of a document."""
    return " ".join(segment["text"] for segment in record["segments"] if "text" in segment)


class Bucket(NamedTuple):
    """What the images of a batch have in common."""

    level: int
    aspect_ratio: float
    grids: tuple[Grid, ...]
    valid_size: tuple[int, int] | None = None


class LoadedImage(NamedTuple):
    """An image as it goes into a batch."""

    bucket: Bucket
    pixels_CHW: torch.Tensor
    sample: Sample
    name: str
    record: dict[str, Any]


class Buckets:
    """Collects images until the batch of one bucket is full."""

    def __init__(self, batch_size: int, split: str):
        self.batch_size = batch_size
        self.split = split
        self._buckets: dict[Bucket, list[Read[LoadedImage]]] = {}

    def add(self, read: Read[LoadedImage]) -> ImageBatch | None:
        """A batch, if this image fills its bucket."""
        bucket = self._buckets.setdefault(read.item.bucket, [])
        bucket.append(read)
        if len(bucket) < self.batch_size:
            return None
        return self._batch(self._buckets.pop(read.item.bucket))

    def pending(self) -> list[Read[LoadedImage]]:
        """Images that no batch has had yet."""
        return [read for bucket in self._buckets.values() for read in bucket]

    def flush(self) -> list[ImageBatch]:
        """What is left, a smaller batch for each bucket."""
        batches = [self._batch(bucket) for bucket in self._buckets.values()]
        self._buckets.clear()
        return batches

    def _batch(self, reads: list[Read[LoadedImage]]) -> ImageBatch:
        items = [read.item for read in reads]
        bucket = items[0].bucket
        return ImageBatch(
            images_BCHW=torch.stack([item.pixels_CHW for item in items]),
            captions=[caption_of(item.record) for item in items],
            keys=[item.sample.key for item in items],
            names=[item.name for item in items],
            records=[item.record for item in items],
            level=bucket.level,
            aspect_ratio=bucket.aspect_ratio,
            grids=bucket.grids,
            split=self.split,
            valid_size=bucket.valid_size,
        )


@dataclass(frozen=True, kw_only=True)
class _ImageRecipe:
    levels: tuple[int, ...]
    batch_size: int
    schedule: ScaleSchedule
    split: str
    cache: ImageCache
    seed: int = 0
    horizontal_flip: bool = False
    min_crop_scale: float = 1.0
    records: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def read(self, sample: Sample) -> LoadedImage:
        record = self._record(sample)
        names = image_names(record)
        if not names:
            raise ValueError("has no image")
        draw = sample.random(self.seed)
        # Evaluation and `predict` name each image in turn; training takes one of a document per pass.
        name = names[sample.part] if sample.part is not None else draw.choice(names) if len(names) > 1 else names[0]
        image = self.cache.read(sample, name)
        base_grid = self.schedule.base_grid(image.height / image.width)
        ratio = base_grid[0] / base_grid[1]
        augment = self.horizontal_flip or self.min_crop_scale < 1 or len(self.levels) > 1
        if not augment:
            level, box, flip = self.levels[0], None, False
        else:
            level = draw.choice(self.levels)
            scale = draw.uniform(self.min_crop_scale, 1.0)
            pixels = self.schedule.pixels(level, ratio)
            box = crop_box(image, pixels, scale, draw.random(), draw.random()) if scale < 1 else None
            flip = self.horizontal_flip and draw.random() < 0.5
        pixels_CHW = fit_image(image, self.schedule.pixels(level, ratio), box)
        bucket = Bucket(level, ratio, self.schedule.grids(level, ratio))
        return LoadedImage(bucket, pixels_CHW.flip(2) if flip else pixels_CHW, sample, name, record)

    def assembler(self) -> Buckets:
        return Buckets(self.batch_size, self.split)

    def _record(self, sample: Sample) -> dict[str, Any]:
        key = (str(sample.shard.path), sample.key)
        record = self.records.get(key)
        if record is None:
            record = sample.shard.record(sample.key)
            if len(self.records) < 100_000:
                self.records[key] = record
        return record
