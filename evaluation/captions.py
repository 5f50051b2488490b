"""How well generated captions agree with their references: exact match and F1 of their words, as in SQuAD."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from nextflow.evaluation.retrieval import Proportion, wilson


class CaptionScores(NamedTuple):
    """Scores over all captions of a split."""

    exact: Proportion
    """Captions with the same words in the same order; case and punctuation aside."""
    token_f1: float
    """Mean over captions of the harmonic mean of word precision and recall; NaN without captions."""


def score_captions(captions: Sequence[str], references: Sequence[str]) -> CaptionScores:
    """Compare captions with references of the same order."""
    pairs = [(words_of(caption), words_of(reference)) for caption, reference in zip(captions, references)]
    exact = wilson(sum(caption == reference for caption, reference in pairs), len(pairs))
    f1 = sum(token_f1(*pair) for pair in pairs) / len(pairs) if pairs else float("nan")
    return CaptionScores(exact, f1)


def token_f1(caption: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of words; two empty texts agree."""
    if not caption or not reference:
        return float(caption == reference)
    shared = sum((Counter(caption) & Counter(reference)).values())
    return 2 * shared / (len(caption) + len(reference))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())
