"""How a stored document is trained on: which segments in which order, and which of them carry loss.

One small class per data type; data modules and the sources of a mixture name them. `loss: false` in a record always stays.
In training some decisions are random: a generator that depends on seed, pass and key alone makes them.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from nextflow.sequence.documents import ImageSegment, TextSegment


class Part(NamedTuple):
    """A segment of a document, with its pixels if it is an image without codes."""

    segment: TextSegment | ImageSegment
    pixels_CHW: Tensor | None = None

    @property
    def is_text(self) -> bool:
        """Whether it is a text."""
        return isinstance(self.segment, TextSegment)

    def without_loss(self) -> "Part":
        """The same part, not trained on."""
        return Part(replace(self.segment, loss=False), self.pixels_CHW)


class Arrangement(ABC):
    """Parts in stored order -> as they are trained on."""

    @abstractmethod
    def __call__(self, parts: list[Part], draw: random.Random | None) -> list[Part]:
        """Arranges one document.

        Args:
            parts: its segments in stored order.
            draw: makes random decisions in training; None in evaluation.

        Raises:
            ValueError: the document is not of this data type. It then counts as a bad sample.
        """

    def within(self, max_length: int | None) -> "Arrangement":
        """The same for rows of so many positions, where it can make documents fit into them."""
        return self


@dataclass(frozen=True, kw_only=True)
class CaptionThenImage(Arrangement):
    """Keeps the stored order, or drops the caption, or turns the document around (NextFlow 3.1)."""

    caption_dropout: float = 0.1
    """Fraction of documents that lose their caption in training, for guidance."""
    captioning_probability: float = 0.0
    """Fraction of documents that become image -> caption in training; the paper has 0.1."""
    text_loss: bool = True
    """Whether captions in front of their image are trained on."""

    def __post_init__(self) -> None:
        _check_fraction("caption_dropout", self.caption_dropout)
        _check_fraction("captioning_probability", self.captioning_probability)

    def __call__(self, parts: list[Part], draw: random.Random | None) -> list[Part]:
        # Both are always drawn, so that changing one probability does not change the other's outcome.
        turned = draw is not None and draw.random() < self.captioning_probability
        dropped = draw is not None and draw.random() < self.caption_dropout
        if all(part.is_text for part in parts):
            raise ValueError("has no image")
        if turned:
            return ImageThenCaption()(parts, draw)
        if dropped:
            return [part for part in parts if not part.is_text]
        return parts if self.text_loss else _untrained_texts(parts)


@dataclass(frozen=True, kw_only=True)
class ImageThenCaption(Arrangement):
    """Images first and not trained on, then the texts."""

    def __call__(self, parts: list[Part], draw: random.Random | None) -> list[Part]:
        images = [part.without_loss() for part in parts if not part.is_text]
        texts = [part for part in parts if part.is_text]
        if not images or not texts:
            raise ValueError(f"has no {'text' if images else 'image'}")
        return images + texts


@dataclass(frozen=True, kw_only=True)
class TextOnly(Arrangement):
    """The texts of a document."""

    max_ids: int | None = None
    """Longer texts are cut to this many ids, in training to a random window, else to the beginning; to a row if not given."""

    def __call__(self, parts: list[Part], draw: random.Random | None) -> list[Part]:
        texts = [part for part in parts if part.is_text]
        if not texts:
            raise ValueError("has no text")
        if self.max_ids is None:
            return texts
        length = sum(len(text.segment.ids) for text in texts if isinstance(text.segment, TextSegment))
        skip = draw.randint(0, length - self.max_ids) if draw is not None and length > self.max_ids else 0
        return _window(texts, skip, self.max_ids)

    def within(self, max_length: int | None) -> "TextOnly":
        """With texts cut to a row; one position of it is the start of the document."""
        return self if self.max_ids is not None or max_length is None else replace(self, max_ids=max_length - 1)


@dataclass(frozen=True, kw_only=True)
class SourceThenResult(Arrangement):
    """Source images and instructions, then the result: what an edit is (NextFlow figure 5).

    The last segment is the result; in front of it stand at least one image and at least one text, in any order.
    """

    source_loss: bool = False
    """Whether the codes of source images are trained on."""
    text_loss: bool = True
    """Whether instructions are trained on; false for supervised fine-tuning, which trains on responses alone."""
    instruction_dropout: float = 0.1
    """Fraction of documents that lose their instruction in training, for guidance."""

    def __post_init__(self) -> None:
        _check_fraction("instruction_dropout", self.instruction_dropout)

    def __call__(self, parts: list[Part], draw: random.Random | None) -> list[Part]:
        kinds = [part.is_text for part in parts]
        if len(parts) < 3 or kinds[-1] or all(kinds[:-1]) or not any(kinds):
            shape = ", ".join("text" if is_text else "image" for is_text in kinds) or "nothing"
            raise ValueError(
                f"is no edit: it holds {shape}, not source images and an instruction with an image behind them"
            )
        *given, result = parts
        if not self.source_loss:
            given = [part if part.is_text else part.without_loss() for part in given]
        if not self.text_loss:
            given = _untrained_texts(given)
        if draw is not None and draw.random() < self.instruction_dropout:
            given = [part for part in given if not part.is_text]
        return [*given, result]


@dataclass(frozen=True, kw_only=True)
class AsStored(Arrangement):
    """Texts and images as they stand: stories, examples in context, conversations."""

    max_images: int | None = None
    """Documents end with this image; the paper has 5 at level 512 and 3 at 1024."""
    text_loss: bool = True
    """Whether texts are trained on."""

    def __post_init__(self) -> None:
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"data.max_images must be positive, not {self.max_images}")

    def __call__(self, parts: list[Part], draw: random.Random | None) -> list[Part]:
        if not parts:
            raise ValueError("is empty")
        if self.max_images is not None:
            images = [place for place, part in enumerate(parts) if not part.is_text]
            if len(images) > self.max_images:
                parts = parts[: images[self.max_images - 1] + 1]
        return parts if self.text_loss else _untrained_texts(parts)


def _untrained_texts(parts: Sequence[Part]) -> list[Part]:
    return [part.without_loss() if part.is_text else part for part in parts]


def _window(texts: Sequence[Part], skip: int, length: int) -> list[Part]:
    """`length` ids behind the first `skip`, over the borders of segments."""
    kept: list[Part] = []
    for part in texts:
        assert isinstance(part.segment, TextSegment)
        ids = part.segment.ids[skip : skip + length]
        skip = max(0, skip - len(part.segment.ids))
        length -= len(ids)
        if len(ids):
            kept.append(Part(replace(part.segment, ids=ids)))
    return kept


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"data.{name} must lie in [0, 1], not {value}")
