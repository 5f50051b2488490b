"""The batch contract: one frozen dataclass per kind of batch. Every DataModule that yields it passes the same tests.

Lightning moves a batch through its `to`. `state` says where the stream stands behind a training batch; the DataModule takes it
off when the batch is consumed, modules never see it.

Shapes: B images, H W pixels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nextflow.sequence.correction import CorrectedCodes
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.layout import PackedRows
from nextflow.sequence.scales import Grid


class StreamState(NamedTuple):
    """Where a stream stands after a batch."""

    slot: int
    """Which of the rank's streams (one per loader worker) the batch comes from."""
    num_slots: int
    source: str
    """Name of what is read, so that stages of a curriculum keep their places apart."""
    position: dict[str, Any]
    """Plain JSON types: pass, window and offset of the stream, and the places of samples that are read but in no batch yet."""


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one size, with their captions: those of one level and bucket of aspect ratio, or of equal native size."""

    images_BCHW: Tensor
    """uint8 [B, 3, H, W]."""
    captions: list[str]
    """The texts of the image's document; empty if it has none."""
    keys: list[str]
    """Key of each sample in its shard."""
    names: list[str]
    """The image's file in its sample, such as "0.png"."""
    records: list[dict[str, Any]]
    """KEY.json of each sample."""
    level: int
    """The level of the bucket; of images of native size the nearest in area."""
    aspect_ratio: float
    """Height / width of the bucket's base grid, or of the native size."""
    grids: tuple[Grid, ...]
    """Grids of all scales of these images."""
    split: str = "train"
    valid_size: tuple[int, int] | None = None
    """Height and width of the pictures in the upper left corner where the rest is padding; None where there is none."""
    state: StreamState | None = None

    @property
    def images(self) -> Tensor:
        """`images_BCHW`."""
        return self.images_BCHW

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ImageBatch":
        """The same batch on another device."""
        return replace(self, images_BCHW=self.images_BCHW.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Packed rows of documents, for next-token and next-scale prediction."""

    rows: PackedRows
    images: tuple[Tensor, ...] = ()
    """uint8 [3, H, W], one per image in document order, to be encoded on the fly; empty when the rows hold codes."""
    grids: tuple[tuple[Grid, ...], ...] = ()
    """Grids of each image in document order."""
    image_names: tuple[str, ...] = ()
    """Source, document and number of each image: what random draws about it are functions of."""
    image_losses: tuple[bool, ...] = ()
    """Whether each image is trained on."""
    corrected: CorrectedCodes | None = None
    """[N] in the order of `rows.code_N`, when token shards hold codes of self-correction for every image that is trained on;
    plain codes for the others."""
    keys: tuple[str, ...] = ()
    """Key of each document."""
    sources: tuple[str, ...] = ()
    """Source of each document in a mixture, "" elsewhere."""
    lengths: tuple[int, ...] = ()
    """Positions of each document."""
    num_documents: int
    level: int
    split: str = "train"
    state: StreamState | None = None

    def __len__(self) -> int:
        return self.num_documents

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on another device."""

        def moved(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
            return (tensor.to(device, non_blocking=non_blocking) for tensor in tensors)

        return replace(
            self,
            rows=self.rows.to(device, non_blocking=non_blocking),
            images=tuple(moved(self.images)),
            corrected=None if self.corrected is None else CorrectedCodes(*moved(self.corrected)),
        )


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """An image of a prompt, still pixels."""

    pixels_CHW: Tensor
    """uint8 [3, H, W], already at the pixels of its grids."""
    grids: tuple[Grid, ...]
    aspect_ratio: float
    """Height / width of its base grid, which says more than its pixels: these are rounded to whole cells."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What generation starts from."""

    index: int
    """Number in the list of prompts; does not depend on batches, ranks or workers."""
    segments: tuple[TextSegment | RawImage, ...]
    text: str
    """The text of the prompt; for task "text" the reference caption, if there is one."""
    level: int
    aspect_ratio: float
    seed: int
    """Seed of this prompt's sampling."""
    key: str = ""
    """Key of the sample it was made from, else the index as digits."""
    task: Literal["image", "text", "reasoning", "interleaved"] = "image"
    """What to generate: a picture, a text, or a text and then a picture."""
    split: str = "prompts"
    kind: str = ""
    """Name of these prompts, where several kinds are answered in turn (`SuiteDataModule`)."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The sample's metadata, for rewards and benchmarks."""
    answer: tuple[str | RawImage, ...] = ()
    """What its document answers with: texts, and pictures where it is one of pixels."""

    @property
    def reference(self) -> Tensor | None:
        """uint8 [3, H, W] that one picture is compared with, such as the known result of an edit."""
        pictures = [part.pixels_CHW for part in self.answer if isinstance(part, RawImage)]
        return pictures[-1] if pictures and self.task in ("image", "reasoning") else None


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts that are generated together."""

    prompts: tuple[Prompt, ...]
    position: int | None = None
    """Training batches that were made up to and with this one; None outside of training."""

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """The same prompts with their images on another device."""

        def moved(segment: TextSegment | RawImage) -> TextSegment | RawImage:
            if isinstance(segment, TextSegment):
                return segment
            return replace(segment, pixels_CHW=segment.pixels_CHW.to(device, non_blocking=non_blocking))

        prompts = tuple(replace(prompt, segments=tuple(map(moved, prompt.segments))) for prompt in self.prompts)
        return replace(self, prompts=prompts)
