"""Documents become batches of packed rows, by one of the strategies of `sequence.packing`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nextflow.datamodules.base import MAKE_CODES
from nextflow.datamodules.batches import PackedBatch
from nextflow.datamodules.streams import Read
from nextflow.sequence.correction import CorrectedCodes
from nextflow.sequence.documents import Document, ImageSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out
from nextflow.sequence.packing import LOOKAHEAD, Packing, pack_fixed_budget, pack_fixed_length, pack_padded


class Item(NamedTuple):
    """A document that waits for its row."""

    document: Document
    images: list[Tensor]
    """Its images without codes, uint8 [3, H, W]."""
    length: int
    """Positions."""
    cost: float
    """Work in positions, for fixed_budget; 0 elsewhere."""
    key: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Filling:
    """What is in a batch."""

    packing: Packing
    batch_size: int
    """Documents (padded), rows (fixed_length), or 1 (fixed_budget: a batch is one row)."""
    max_length: int | None = None
    """Positions of a row, for fixed_length."""
    budget: int | None = None
    """Work of a row in positions, for fixed_budget."""

    def __post_init__(self) -> None:
        if self.packing == "fixed_length" and self.max_length is None:
            raise ValueError("data.packing = fixed_length needs data.max_length, the length of a row")
        if self.packing == "fixed_budget" and (self.budget is None or self.budget < 1):
            raise ValueError("data.packing = fixed_budget needs data.budget, the work of a batch in positions")
        if self.packing == "fixed_budget" and self.batch_size != 1:
            raise ValueError(
                "data.packing = fixed_budget makes one row of a batch, and data.budget says how much is in it: set "
                f"data.batch_size, and batch_size of a curriculum's stage, to 1 (it is {self.batch_size})"
            )


class Packs:
    """Collects documents until a batch of rows is full."""

    def __init__(self, filling: Filling, *, vocabulary: Vocabulary, layout: LayoutConfig, level: int, split: str):
        self.filling, self.vocabulary, self.layout = filling, vocabulary, layout
        self.level, self.split = level, split
        self._reads: list[Read[Item]] = []

    def add(self, read: Read[Item]) -> PackedBatch | None:
        """Takes a document; returns a batch if that completes one."""
        self._reads.append(read)
        rows = self._rows()
        return None if rows is None else self._batch(rows)

    def pending(self) -> list[Read[Item]]:
        """The documents that are in no batch yet, in the order in which they came."""
        return list(self._reads)

    def flush(self) -> list[PackedBatch]:
        """What is left as batches."""
        batches = []
        while (rows := self._rows(rest=True)) is not None:
            batches.append(self._batch(rows))
        return batches

    def _rows(self, rest: bool = False) -> list[list[int]] | None:
        """Rows of the next batch, or None if it is not full yet; with `rest` whatever there is makes one."""
        filling = self.filling
        if filling.budget is not None and filling.packing == "fixed_budget":
            costs = [read.item.cost for read in self._reads]
            row = pack_fixed_budget(costs, filling.budget, 0 if rest else LOOKAHEAD)
            return None if row is None else [row]
        lengths = [read.item.length for read in self._reads]
        if filling.max_length is not None and filling.packing == "fixed_length":
            # More positions than rows have room for: first fit opens one row too many, so the others are as full as they get.
            if not lengths or not (rest or sum(lengths) > filling.batch_size * filling.max_length):
                return None
            return pack_fixed_length(lengths, filling.max_length)[: filling.batch_size]
        if not lengths or not (rest or len(lengths) >= filling.batch_size):
            return None
        return pack_padded(lengths)[: filling.batch_size]

    def _batch(self, rows: list[list[int]]) -> PackedBatch:
        taken = [index for row in rows for index in row]
        items = [self._reads[index].item for index in taken]
        packed = lay_out(
            [[self._reads[index].item.document for index in row] for row in rows],
            self.vocabulary,
            self.layout,
            self.filling.max_length if self.filling.packing == "fixed_length" else None,
        )
        left = set(range(len(self._reads))) - set(taken)
        self._reads = [self._reads[index] for index in sorted(left)]
        images = tuple(image for item in items for image in item.images)
        pictures = [_pictures(item.document) for item in items]
        segments = [segment for of_item in pictures for segment in of_item]
        if images and len(images) < len(segments):
            raise ValueError(
                "some documents hold images and others codes, which one batch cannot mix: read all sources of a mixture from "
                f"token shards ({MAKE_CODES}), or all from document shards"
            )
        return PackedBatch(
            rows=packed,
            images=images,
            grids=tuple(segment.grids for segment in segments),
            image_names=tuple(
                f"{item.source}/{item.key}.{number}"
                for item, of_item in zip(items, pictures)
                for number in range(len(of_item))
            ),
            image_losses=tuple(segment.loss for segment in segments),
            corrected=_corrected(segments),
            keys=tuple(item.key for item in items),
            sources=tuple(item.source for item in items),
            lengths=tuple(item.length for item in items),
            num_documents=len(items),
            level=self.level,
            split=self.split,
        )


def _pictures(document: Document) -> list[ImageSegment]:
    return [segment for segment in document.segments if isinstance(segment, ImageSegment)]


def _corrected(images: list[ImageSegment]) -> CorrectedCodes | None:
    """The stored codes of self-correction of all images; None unless each one that is trained on has them."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for image in images:
        if image.codes is None or (image.loss and image.corrected is None):
            return None
        pairs.append(image.corrected if image.loss and image.corrected else (image.codes, image.codes))
    if not pairs:
        return None
    input_codes, target_codes = zip(*pairs)
    return CorrectedCodes(torch.cat(input_codes), torch.cat(target_codes))
