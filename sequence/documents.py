"""Documents: what a training example or a prompt is before it becomes a sequence.

A document is a list of segments, a segment is a text or an image. Every data type is a kind of document: a caption and its
picture, a picture and its caption, source, instruction and result of an edit, a story.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nextflow.sequence.correction import CorrectedCodes
from nextflow.sequence.scales import Grid


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids of the transformer: text ids, then `<boi>`, `<eoi>`, then one id per code."""

    text_size: int
    """Number of text ids, the special ids of the text tokenizer included."""
    codebook_size: int
    """Number of codes."""
    start_id: int
    """Text id that starts every document."""
    end_id: int
    """Text id that every document ends with."""

    @property
    def boi(self) -> int:
        """Id of `<boi>`, begin of image."""
        return self.text_size

    @property
    def eoi(self) -> int:
        """Id of `<eoi>`, end of image."""
        return self.text_size + 1

    @property
    def code_offset(self) -> int:
        """Id of code 0."""
        return self.text_size + 2

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.code_offset + self.codebook_size


@dataclass(frozen=True, kw_only=True)
class TextSegment:
    """A run of text ids."""

    ids: Sequence[int]
    """Text ids, without start and end."""
    loss: bool = True
    """Whether its ids are trained on."""


@dataclass(frozen=True, kw_only=True)
class ImageSegment:
    """An image as codes."""

    grids: tuple[Grid, ...]
    """Grids of its scales, coarse to fine."""
    codes: Tensor | None = None
    """Codes [N], int64; None when the image is encoded on the fly."""
    corrected: CorrectedCodes | None = None
    """Codes [N] to feed and to predict under self-correction, where they are stored beside the plain ones. A layout holds the
    plain ones; who trains exchanges them (`PackedRows.with_codes`)."""
    loss: bool = True
    """Whether its codes are trained on."""


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, kw_only=True)
class Document:
    """Segments in reading order. Every data type is a kind of document."""

    segments: tuple[Segment, ...]
    source: str = ""
