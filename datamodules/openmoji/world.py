"""What the OpenMoji sources share: the drawings of each split, the studio that draws them, and the form of a document."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from nextflow.datamodules.openmoji.catalogue import SPLITS, TONES, Drawing
from nextflow.datamodules.openmoji.studio import Studio
from nextflow.sequence.scales import ScaleSchedule

Item = TypeVar("Item")
Layout = Literal["single", "corner", "count", "pair", "groups", "row", "corners"]
"""How the things of a composed scene stand."""
LAYOUTS: Mapping[Layout, float] = {
    "single": 2, "corner": 1, "count": 3, "pair": 3, "groups": 3, "row": 2, "corners": 1,
}  # fmt: skip
"""Layout to its share: how often it is drawn."""
# Documents in a row that cannot be made before a source is taken to have none.
MAX_MISSES = 50


@dataclass(frozen=True, kw_only=True)
class MojiDocument:
    """A document before it is written: texts, PNG files, and what they show."""

    segments: tuple[str | bytes, ...]
    """In reading order: a text, or the PNG file of an image."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Exactly what is drawn and said, for rewards and evaluation."""
    prompt: int = 0
    """How many segments in front are given and not learnt: a question, a request, examples."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Drawings to make documents of."""

    drawings: tuple[Drawing, ...]
    studio: Studio
    schedule: ScaleSchedule
    """Ratios of composed pictures; `studio.size` is one of its levels."""
    seed: int = 0
    languages: tuple[str, ...] = ()
    """Codes of languages, of those of the package `emoji`."""
    alignment: int = 1
    """Composed scenes place drawings at multiples of this many pixels."""
    other_ratios: float = 0.6
    """Share of composed scenes whose ratio is drawn from those of `schedule`; the others are square."""
    layouts: Mapping[Layout, float] = field(default_factory=lambda: LAYOUTS)
    """Layout of a composed scene to its share."""

    @cached_property
    def by_name(self) -> dict[str, Drawing]:
        """Drawings by the name of the package `emoji`."""
        return {drawing.name: drawing for drawing in self.drawings}

    def draws(self, kind: str, split: str) -> Iterator[random.Random]:
        """One generator per document; it depends on the seed, kind, split and number of the document alone."""
        number = 0
        while True:
            yield random.Random(f"{self.seed}/{kind}/{split}/{number}")
            number += 1

    def shuffled(self, items: Iterable[Item], *names: object) -> list[Item]:
        """The items in an order that depends on the seed and the names alone."""
        order = list(items)
        random.Random(f"{self.seed}/{names}").shuffle(order)
        return order


def split_of(drawings: Iterable[Drawing]) -> str:
    """The split of a document of several drawings: that of the one held out most strictly."""
    return SPLITS[max(SPLITS.index(drawing.split) for drawing in drawings)]


def tone_of(drawing: Drawing) -> str:
    """Its skin tone; yellow where it has none."""
    return drawing.tones[0] if drawing.tones else "yellow"


TONE_ORDER = tuple(TONES.values())
"""Skin tones from light to dark."""


def kept(documents: Iterable[MojiDocument | None]) -> Iterator[MojiDocument]:
    """Leaves out what could not be made, and ends when nothing can be made any more."""
    misses = 0
    for document in documents:
        misses = misses + 1 if document is None else 0
        if document is not None:
            yield document
        elif misses >= MAX_MISSES:
            return


def cycled(items: Sequence[Item]) -> Iterator[Item]:
    """The items over and over; none for none."""
    while items:
        yield from items
