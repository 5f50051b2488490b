"""DataModules whose batches are packed rows: the common part of text-to-image, image-to-text and what follows.

A document is read, arranged (which segments in which order, which are trained on) and laid out. From token shards the rows hold
codes; from document shards the batch carries the images and the module encodes them on the fly.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nextflow.datamodules.arrangements import Arrangement, Part
from nextflow.datamodules.base import Recipe, ShardDataModule, Stage
from nextflow.datamodules.packs import Filling, Item, Packs
from nextflow.datamodules.pixels import ImageCache, fit_image
from nextflow.datamodules.streams import Sample
from nextflow.sequence.correction import CorrectedCodes
from nextflow.sequence.documents import Document, ImageSegment, TextSegment, Vocabulary
from nextflow.sequence.flops import DecoderShape, FlopsModel, document_work
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.packing import Packing, document_length
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import decode_codes
from nextflow.sequence.text_tokenizer import load_text_tokenizer


@dataclass(kw_only=True, eq=False, repr=False)
class PackedDataModule(ShardDataModule):
    """Packed rows from document or token shards: the options that all data types share.

    A subclass says in `arrange` how its documents are arranged; its own options are further fields.
    """

    shards: dict[str, str]
    """Split -> glob pattern of document or token shards; `{level}` in it stands for the level."""
    text_tokenizer: str
    """Local folder of a Hugging Face tokenizer. (The attribute holds the tokenizer itself.)"""
    codebook_size: int
    """Number of codes of the image tokenizer."""
    level: int
    """Level to train at; a ResolutionCurriculum sets it per stage."""
    schedule: ScaleSchedule = ScaleSchedule()  # noqa: RUF009 (frozen)
    """Scale schedule."""
    batch_size: int = 32
    """Documents (padded) or rows (fixed_length) per batch and device; 1 with fixed_budget."""
    layout: LayoutConfig = LayoutConfig()  # noqa: RUF009 (frozen)
    """Positions, weights and resizing of the sequence."""
    packing: Packing = "padded"
    """padded (one document per row), fixed_length (rows of max_length, filled with documents) or fixed_budget (one row of equal
    work per batch)."""
    max_length: int | None = None
    """Positions of a row; longer documents are skipped, longer texts without images are cut."""
    budget: int | None = None
    """Work of a batch in positions, for fixed_budget. A position that sees and predicts nothing counts 1; attention, targets
    and image cells come on top. Documents of more work are skipped."""
    transformer: DecoderShape | None = None
    """The sizes of model.transformer, from which fixed_budget computes the work of a document."""
    batches_per_epoch: int | None = None
    """Training batches of an epoch; one pass over the data if not given (padded only)."""
    validation_splits: list[str] = field(default_factory=lambda: ["validation"])
    """Splits of validation."""
    test_splits: list[str] = field(default_factory=lambda: ["validation"])
    """Splits of `test`."""
    predict_splits: list[str] | None = None
    """Splits of `predict`; all of `shards` if not given."""
    window_shards: int = 16
    """Shards that are shuffled together."""
    cache_megabytes: int = 512
    """Memory for decoded documents, per process."""
    num_workers: int = 0
    """Loader processes."""
    seed: int = 0
    """Of the order and of all that is random about a document."""
    max_bad_fraction: float = 0.01
    """Stop when more samples than this cannot be read."""

    def __post_init__(self) -> None:
        super().__init__(
            shards=self.shards,
            schedule=self.schedule,
            batch_size=self.batch_size,
            batches_per_epoch=self.batches_per_epoch,
            validation_splits=self.validation_splits,
            test_splits=self.test_splits,
            predict_splits=self.predict_splits,
            window_shards=self.window_shards,
            num_workers=self.num_workers,
            seed=self.seed,
            max_bad_fraction=self.max_bad_fraction,
        )
        self.schedule.num_scales(self.level)
        self.filling = Filling(
            packing=self.packing, batch_size=self.batch_size, max_length=self.max_length, budget=self.budget
        )
        if self.packing == "fixed_budget" and self.transformer is None:
            raise ValueError("data.packing = fixed_budget needs data.transformer, the sizes of model.transformer")
        tokenizer = load_text_tokenizer(self.text_tokenizer)
        # From here on the tokenizer itself, which modules compare with theirs.
        self.text_tokenizer = tokenizer  # type: ignore[assignment]
        self.encode_text = tokenizer.encode
        self.vocabulary = Vocabulary(
            text_size=tokenizer.size,
            codebook_size=self.codebook_size,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
        )
        self.arrangements = {name: one.within(self.max_length) for name, one in self.arrange().items()}
        self.cache = _DocumentCache(self.cache_megabytes)

    @abstractmethod
    def arrange(self) -> Mapping[str, Arrangement]:
        """How documents are arranged, by the name of their source; "" where there is one source."""

    def training_recipe(self, stage: Stage | None) -> tuple[Recipe, str, int]:
        recipe = self.recipe("train", stage, training=True)
        pattern = self.pattern("train").replace("{level}", str(recipe.level))
        if stage is not None:
            return recipe, pattern, stage.num_batches
        if self.batches_per_epoch is not None:
            return recipe, pattern, self.batches_per_epoch
        if self.packing != "padded":
            raise ValueError(
                f"data.packing = {self.packing} needs data.batches_per_epoch: rows hold any number of documents"
            )
        num_documents = sum(len(self.open(path)) for path in self.paths("train", pattern))
        return recipe, pattern, max(1, num_documents // (self.batch_size * self.rank[1]))

    def evaluation_recipes(self, split: str, predict: bool) -> list[tuple[Recipe, str]]:
        recipe = self.recipe(split, None if predict else self.stage)
        return [(recipe, self.pattern(split).replace("{level}", str(recipe.level)))]

    def recipe(self, split: str, stage: Stage | None, *, source: str = "", training: bool = False) -> "PackedRecipe":
        """How documents become batches in a stage; the sizes of batches are the stage's in training alone."""
        layout, filling = self.layout, self.filling
        if stage is not None:
            layout = replace(layout, alpha=stage.alpha)
            # The budget in evaluation too: it decides which documents are too large.
            filling = replace(filling, budget=stage.budget or filling.budget)
        if stage is not None and training:
            filling = replace(filling, batch_size=stage.batch_size or filling.batch_size)
        level = self.level if stage is None else stage.level
        return PackedRecipe(self, split, level, filling, layout, source=source, training=training)


@dataclass
class _Stored:
    """A document as it is kept in memory."""

    texts: list[tuple[int, TextSegment]]
    codes: list[tuple[int, ImageSegment]]
    images: list[tuple[int, str, bool]]
    """Place in the document, file and loss of images without codes."""


class PackedRecipe:
    """Reads, arranges and lays out documents of one level."""

    def __init__(
        self,
        owner: PackedDataModule,
        split: str,
        level: int,
        filling: Filling,
        layout: LayoutConfig,
        *,
        source: str,
        training: bool,
    ):
        self.training = training
        self.split, self.level, self.filling, self.layout, self.source = split, level, filling, layout, source
        self.arrangements, self.cache, self.schedule = owner.arrangements, owner.cache, owner.schedule
        self.vocabulary, self.encode_text = owner.vocabulary, owner.encode_text
        self.max_length, self.seed = owner.max_length, owner.seed
        shape = owner.transformer
        self.flops = None if shape is None else FlopsModel(shape=shape, vocabulary_size=owner.vocabulary.size)

    def read(self, sample: Sample) -> Item:
        """The document, arranged; what is random about it is so in training alone."""
        draw = sample.random(self.seed) if self.training else None
        source = sample.source or self.source
        parts = self.arrangements[source](self._parts(sample), draw)
        if not any(part.segment.loss for part in parts):
            raise ValueError(
                "holds nothing that is trained on: each segment says loss: false, or is made so by the data type"
            )
        document = Document(segments=tuple(part.segment for part in parts))
        length = document_length(document, feed_last_scale=self.layout.feed_last_scale)
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"has {length} positions, more than data.max_length = {self.max_length}")
        images = [part.pixels_CHW for part in parts if part.pixels_CHW is not None]
        return Item(document, images, length, self._cost(document), sample.key, source)

    def assembler(self) -> Packs:
        """Packs of this level."""
        return Packs(self.filling, vocabulary=self.vocabulary, layout=self.layout, level=self.level, split=self.split)

    def _cost(self, document: Document) -> float:
        budget = self.filling.budget
        if self.filling.packing != "fixed_budget" or budget is None or self.flops is None:
            return 0.0
        cost = self.flops.in_positions(document_work(document, feed_last_scale=self.layout.feed_last_scale))
        if cost > budget:
            raise ValueError(f"has the work of {cost:.0f} positions, more than data.budget = {budget}")
        return cost

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
                ids = self.encode_text(segment["text"])
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
        corrected = None
        if codes.input_codes_N is not None and codes.target_codes_N is not None:
            corrected = CorrectedCodes(self._checked(codes.input_codes_N), self._checked(codes.target_codes_N))
        return ImageSegment(
            grids=self.schedule.grids(codes.level, codes.base_grid[0] / codes.base_grid[1]),
            codes=self._checked(codes.codes_N),
            corrected=corrected,
            loss=loss,
        )

    def _checked(self, codes_N: np.ndarray) -> Tensor:
        size = self.vocabulary.codebook_size
        if codes_N.size and not 0 <= int(codes_N.min()) <= int(codes_N.max()) < size:
            raise ValueError(f"holds codes up to {int(codes_N.max())}, but data.codebook_size is {size}")
        return torch.from_numpy(codes_N.astype("int64"))


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
            num_codes = sum(_num_stored(segment) for _, segment in stored.codes)
            # Python integers take 36 bytes each in a list; the objects around them some 2 kB.
            size = 36 * num_ids + 8 * num_codes + 2048
            if size <= self.free:
                self.free -= size
                self._documents[key] = stored
        return stored


def _num_stored(image: ImageSegment) -> int:
    tensors = (image.codes, *(image.corrected or ()))
    return sum(0 if codes is None else codes.numel() for codes in tensors)
