"""A suite of tasks whose right answers are known: what was answered, whether it was right, and the scores of all of it.

A judge looks at the answers to one kind of prompt and says of each in which categories it counts and whether it is right there.
`evaluation.judges` has those of OpenMoji. A score is a share of right answers with its Wilson interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from nextflow.evaluation.drawings import SPLITS
from nextflow.evaluation.retrieval import Proportion, wilson

if TYPE_CHECKING:
    import torch

Part = str | np.ndarray
"""A text, or a picture (uint8 [H, W, 3])."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One prompt, what it was answered with, and what is known to be right."""

    kind: str
    """Of prompt: which judge looks at it."""
    index: int
    """Number of the prompt among those of its kind."""
    key: str
    split: str
    given: tuple[Part, ...]
    """The prompt."""
    answer: tuple[Part, ...]
    known: tuple[Part, ...]
    """What the document of the prompt answers with."""
    metadata: Mapping[str, Any]
    """What the document says of itself."""

    @property
    def pictures(self) -> list[np.ndarray]:
        """Of the answer."""
        return pictures_of(self.answer)

    @property
    def text(self) -> str:
        """Of the answer."""
        return text_of(self.answer)


class Measure(NamedTuple):
    """A number beside right and wrong, such as 23.1 dB."""

    value: float
    unit: str


class Verdict(NamedTuple):
    """What a judge says of an answer in one category."""

    category: str
    right: bool
    detail: str = ""
    """Part of the category, such as the attribute that an edit changes."""
    measure: Measure | None = None


class Judge(Protocol):
    """Looks at all answers of its kind at once."""

    def __call__(self, answers: Sequence[Answered]) -> list[list[Verdict]]:
        """Verdicts on each answer; none where it counts nowhere."""


class Judged(NamedTuple):
    """An answer and what was said of it."""

    answered: Answered
    verdicts: list[Verdict]


class Score(NamedTuple):
    """A category of one split, or one detail of it."""

    category: str
    split: str
    detail: str
    right: Proportion
    measure: Measure | None
    """The mean."""

    @property
    def name(self) -> str:
        """For loggers: editing/compositional."""
        words = (self.category, self.split, self.detail)
        return "/".join(word.replace(" ", "_").replace(",", "") for word in words if word)


def tally(judged: Iterable[Judged], categories: Sequence[str], details: bool = False) -> list[Score]:
    """Scores per category and split, in the order of `categories`; with `details` per detail as well."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for answered, verdicts in judged:
        for verdict in verdicts:
            groups.setdefault((verdict.category, answered.split, verdict.detail if details else ""), []).append(verdict)

    def place(name: tuple[str, str, str]) -> tuple[int, int, str]:
        return categories.index(name[0]), SPLITS.index(name[1]) if name[1] in SPLITS else len(SPLITS), name[2]

    return [
        Score(*name, wilson(sum(verdict.right for verdict in groups[name]), len(groups[name])), _mean(groups[name]))
        for name in sorted(groups, key=place)
    ]


def pictures_of(parts: Iterable[Part]) -> list[np.ndarray]:
    """The pictures among some parts."""
    return [part for part in parts if not isinstance(part, str)]


def text_of(parts: Iterable[Part]) -> str:
    """The texts among some parts, joined."""
    return " ".join(part.strip() for part in parts if isinstance(part, str))


def image_of(pixels_HWC: np.ndarray) -> torch.Tensor:
    """A picture as rewards take it: uint8 [3, H, W]."""
    import torch  # here: tables of scores need none

    return torch.from_numpy(np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)))


def _mean(verdicts: Sequence[Verdict]) -> Measure | None:
    measures = [verdict.measure for verdict in verdicts if verdict.measure is not None]
    return Measure(sum(one.value for one in measures) / len(measures), measures[0].unit) if measures else None
