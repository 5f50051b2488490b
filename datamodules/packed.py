"""DataModules whose batches are packed rows: the common part of text-to-image, image-to-text and what follows.

A document is read, arranged (which segments in which order, which are trained on) and laid out. From token shards the rows hold
codes; from document shards the batch carries the images and the module encodes them on the fly.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nextflow.datamodules.base import Recipe, ShardDataModule, Stage
from nextflow.datamodules.batches import PackedBatch
from nextflow.datamodules.pixels import ImageCache, fit_image
from nextflow.datamodules.streams import Read, Sample
from nextflow.sequence.documents import Document, ImageSegment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out
from nextflow.sequence.packing import Packing, document_length, pack_fixed_length, pack_padded
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import decode_codes
from nextflow.sequence.text_tokenizer import load_text_tokenizer


class Part(NamedTuple):
    """A segment of a document, with its pixels if it is an image without codes."""

    segment: TextSegment | ImageSegment
    pixels_CHW: Tensor | None = None

    @property
    def is_text(self) -> bool:
        """Whether it is a text."""
        return isinstance(self.segment, TextSegment)

    def with_loss(self, loss: bool) -> "Part":
        """The same part, trained on or not."""
        return Part(replace(self.segment, loss=loss), self.pixels_CHW)


Arrange = Callable[[list[Part], random.Random | None], list[Part]]
"""Parts in stored order -> as they are trained on. The generator is for random decisions in training, None in evaluation."""


class PackedDataModule(ShardDataModule):
    """Packed rows from document or token shards. Subclasses decide how documents are arranged."""

    def __init__(
        self,
        *,
        arrange: Arrange,
        shards: Mapping[str, str],
        text_tokenizer: str,
        codebook_size: int,
        schedule: ScaleSchedule,
        level: int,
        batch_size: int,
        layout: LayoutConfig,
        packing: Packing,
        max_length: int | None,
        batches_per_epoch: int | None,
        validation_splits: list[str],
        test_splits: list[str],
        predict_splits: list[str] | None,
        window_shards: int,
        cache_megabytes: int,
        num_workers: int,
        seed: int,
        max_bad_fraction: float,
    ):
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
        schedule.num_scales(level)
        if packing == "fixed_length" and max_length is None:
            raise ValueError("data.packing = fixed_length needs data.max_length, the length of a row")
        self.arrange = arrange
        self.level = level
        self.layout = layout
        self.packing = packing
        self.max_length = max_length
        self.codebook_size = codebook_size
        self.text_tokenizer = load_text_tokenizer(text_tokenizer)
        self.vocabulary = Vocabulary(
            text_size=self.text_tokenizer.size,
            codebook_size=codebook_size,
            start_id=self.text_tokenizer.start_id,
            end_id=self.text_tokenizer.end_id,
        )
        self.cache = _DocumentCache(cache_megabytes)

    def training_recipe(self, stage: Stage | None) -> tuple["_PackedRecipe", str, int]:
        level = self.level if stage is None else stage.level
        batch_size = self.batch_size if stage is None or stage.batch_size is None else stage.batch_size
        pattern = self.pattern("train").replace("{level}", str(level))
        paths = self.paths("train", pattern)
        layout = self.layout if stage is None else replace(self.layout, alpha=stage.alpha)
        recipe = self._recipe("train", level, batch_size, layout)
        if stage is not None:
            num_batches = stage.num_batches
        elif self.batches_per_epoch is not None:
            num_batches = self.batches_per_epoch
        elif self.packing == "padded":
            num_batches = max(1, sum(len(self.open(path)) for path in paths) // (batch_size * self.rank[1]))
        else:
            raise ValueError(
                f"data.packing = {self.packing} needs data.batches_per_epoch: rows hold any number of documents"
            )
        return recipe, pattern, num_batches

    def evaluation_recipes(self, split: str, predict: bool) -> list[tuple[Recipe, str]]:
        stage = None if predict else self.stage
        level = self.level if stage is None else stage.level
        layout = self.layout if stage is None else replace(self.layout, alpha=stage.alpha)
        pattern = self.pattern(split).replace("{level}", str(level))
        return [(self._recipe(split, level, self.batch_size, layout), pattern)]

    def _recipe(self, split: str, level: int, batch_size: int, layout: LayoutConfig) -> "_PackedRecipe":
        return _PackedRecipe(self, split, level, batch_size, layout)


class _Item(NamedTuple):
    document: Document
    images: list[Tensor]
    length: int
    key: str


@dataclass
class _Stored:
    """A document as it is kept in memory."""

    texts: list[tuple[int, TextSegment]]
    codes: list[tuple[int, ImageSegment]]
    images: list[tuple[int, str, bool]]
    """Place in the document, file and loss of images without codes."""


class _PackedRecipe:
    def __init__(self, owner: PackedDataModule, split: str, level: int, batch_size: int, layout: LayoutConfig):
        self.split, self.level, self.batch_size, self.layout = split, level, batch_size, layout
        self.arrange, self.cache, self.schedule = owner.arrange, owner.cache, owner.schedule
        self.vocabulary, self.text_tokenizer = owner.vocabulary, owner.text_tokenizer
        self.packing, self.max_length, self.seed = owner.packing, owner.max_length, owner.seed

    def read(self, sample: Sample) -> _Item:
        draw = sample.random(self.seed) if self.split == "train" else None
        parts = self.arrange(self._parts(sample), draw)
        document = Document(segments=tuple(part.segment for part in parts))
        length = document_length(document, feed_last_scale=self.layout.feed_last_scale)
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"has {length} positions, more than data.max_length = {self.max_length}")
        images = [part.pixels_CHW for part in parts if part.pixels_CHW is not None]
        return _Item(document, images, length, sample.key)

    def assembler(self) -> "_Packs":
        return _Packs(self)

    def _parts(self, sample: Sample) -> list[Part]:
        stored = self.cache.get(sample, self._store)
        parts: list[tuple[int, Part]] = [(place, Part(text)) for place, text in stored.texts]
        parts += [(place, Part(image)) for place, image in stored.codes]
        for place, name, loss in stored.images:
            image = self.cache.images.read(sample, name)
            ratio = image.height / image.width
            segment = ImageSegment(grids=self.schedule.grids(self.level, ratio), loss=loss)
            parts.append((place, Part(segment, fit_image(image, self.schedule.pixels(self.level, ratio)))))
        if stored.images or len(stored.codes) > 1 or len(stored.texts) > 1:
            parts.sort(key=lambda numbered: numbered[0])
        elif stored.codes and stored.texts and stored.codes[0][0] < stored.texts[0][0]:
            parts.reverse()
        return [part for _, part in parts]

    def _store(self, sample: Sample) -> _Stored:
        stored = _Stored([], [], [])
        for place, segment in enumerate(sample.shard.record(sample.key)["segments"]):
            loss = bool(segment.get("loss", True))
            if "text" in segment:
                ids = self.text_tokenizer.encode(segment["text"])
                if ids:
                    stored.texts.append((place, TextSegment(ids=ids, loss=loss)))
                continue
            name = sample.shard.image_name(sample.key, segment["image"])
            if sample.shard.header.kind == "codes":
                stored.codes.append((place, self._codes(sample.shard.read(sample.key, name), loss)))
            else:
                stored.images.append((place, name, loss))
        return stored

    def _codes(self, data: bytes, loss: bool) -> ImageSegment:
        codes = decode_codes(data)
        if codes.level != self.level:
            raise ValueError(
                f"holds codes of level {codes.level}, this run reads level {self.level}: put {{level}} in data.shards"
            )
        if codes.base_grid not in self.schedule.base_grids:
            raise ValueError(f"has the base grid {codes.base_grid}, which data.schedule.base_grids does not have")
        size = self.vocabulary.codebook_size
        if codes.codes_N.size and not 0 <= int(codes.codes_N.min()) <= int(codes.codes_N.max()) < size:
            raise ValueError(f"holds codes up to {int(codes.codes_N.max())}, but data.codebook_size is {size}")
        fed = None if codes.input_codes_N is None else torch.from_numpy(codes.input_codes_N.astype("int64"))
        return ImageSegment(
            grids=self.schedule.grids(codes.level, codes.base_grid[0] / codes.base_grid[1]),
            codes=torch.from_numpy(codes.codes_N.astype("int64")),
            input_codes=fed,
            loss=loss,
        )


class _DocumentCache:
    """Decoded documents up to a size in memory."""

    def __init__(self, megabytes: int):
        # Half for images, which are kept by themselves as they are shared between levels.
        self.images = ImageCache(megabytes // 2)
        self.free = (megabytes - megabytes // 2) * 2**20
        self._documents: dict[tuple[str, str], _Stored] = {}

    def get(self, sample: Sample, make: Callable[[Sample], _Stored]) -> _Stored:
        key = (str(sample.shard.path), sample.key)
        stored = self._documents.get(key)
        if stored is None:
            stored = make(sample)
            num_ids = sum(len(segment.ids) for _, segment in stored.texts)
            num_codes = sum(0 if segment.codes is None else segment.codes.numel() for _, segment in stored.codes)
            # Python integers take 36 bytes each in a list; the objects around them some 2 kB.
            size = 36 * num_ids + 16 * num_codes + 2048
            if size <= self.free:
                self.free -= size
                self._documents[key] = stored
        return stored


class _Packs:
    """Collects documents until a batch of rows is full."""

    def __init__(self, recipe: _PackedRecipe):
        self.recipe = recipe
        self._reads: list[Read[_Item]] = []
        self._length = 0

    def add(self, read: Read[_Item]) -> PackedBatch | None:
        self._reads.append(read)
        self._length += read.item.length
        recipe = self.recipe
        if recipe.packing == "padded":
            return self._batch(pack_padded(self._lengths())) if len(self._reads) >= recipe.batch_size else None
        assert recipe.max_length is not None
        # More positions than the rows have room for: first fit opens one row too many, so the others are as full as they get.
        if self._length <= recipe.batch_size * recipe.max_length:
            return None
        return self._batch(pack_fixed_length(self._lengths(), recipe.max_length)[: recipe.batch_size])

    def pending(self) -> list[Read[_Item]]:
        return list(self._reads)

    def flush(self) -> list[PackedBatch]:
        batches = []
        while self._reads:
            length = self.recipe.max_length
            fixed = self.recipe.packing == "fixed_length" and length is not None
            rows = pack_fixed_length(self._lengths(), length or 0) if fixed else pack_padded(self._lengths())
            batches.append(self._batch(rows[: self.recipe.batch_size]))
        return batches

    def _lengths(self) -> list[int]:
        return [read.item.length for read in self._reads]

    def _batch(self, rows: list[list[int]]) -> PackedBatch:
        recipe = self.recipe
        taken = [index for row in rows for index in row]
        items = [self._reads[index].item for index in taken]
        packed = lay_out(
            [[self._reads[index].item.document for index in row] for row in rows],
            recipe.vocabulary,
            recipe.layout,
            recipe.max_length if recipe.packing == "fixed_length" else None,
        )
        left = set(range(len(self._reads))) - set(taken)
        self._reads = [self._reads[index] for index in sorted(left)]
        self._length = sum(self._lengths())
        return PackedBatch(
            rows=packed,
            images=tuple(image for item in items for image in item.images),
            grids=tuple(
                segment.grids
                for item in items
                for segment in item.document.segments
                if isinstance(segment, ImageSegment)
            ),
            keys=tuple(item.key for item in items),
            num_documents=len(items),
            level=recipe.level,
            split=recipe.split,
        )
