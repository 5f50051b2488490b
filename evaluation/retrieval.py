"""Retrieval accuracy: is the picture generated for a caption nearest to the drawing of that caption, among all drawings?

Distance is the mean squared difference of pixels. The measure asks for the very drawing, so it suits closed data sets, where a
caption has one right picture; it rises only if prompts are followed and pictures are sharp enough to be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Proportion(NamedTuple):
    """Hits among trials, with the 95 % Wilson interval."""

    hits: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Share of hits; NaN without trials."""
        return self.hits / self.trials if self.trials else math.nan

    def __str__(self) -> str:
        if not self.trials:
            return "-"
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.hits} / {self.trials})"


class SplitRetrieval(NamedTuple):
    """Retrieval of the pictures of one split."""

    rank_1: Proportion
    rank_5: Proportion
    median_rank: float


class Retrieval(NamedTuple):
    """Retrieval of all pictures."""

    ranks: tuple[int, ...]
    """Rank of the right drawing for each picture, from 1; the best one where several are right."""
    splits: Mapping[str, SplitRetrieval]


def retrieve(
    pictures: Sequence[np.ndarray],
    answers: Sequence[Sequence[int]],
    splits: Sequence[str],
    gallery: Sequence[np.ndarray],
) -> Retrieval:
    """Rank the gallery for each picture.

    Args:
        pictures: uint8 [H, W, 3], of the size of the gallery.
        answers: for each picture the right places in the gallery, at least one.
        splits: split of each picture.
        gallery: uint8 [H, W, 3], all drawings.

    A tie with another drawing counts for the picture: identical drawings cannot be told apart.
    """
    distance_PG = squared_distances(np.stack(pictures), np.stack(gallery)) if len(pictures) else np.zeros((0, 1))
    ranks = tuple(
        int((distance_G < distance_G[list(right)].min()).sum()) + 1 for distance_G, right in zip(distance_PG, answers)
    )
    return Retrieval(
        ranks, {split: _of_split([r for r, s in zip(ranks, splits) if s == split]) for split in dict.fromkeys(splits)}
    )


def squared_distances(pictures_PHWC: np.ndarray, gallery_GHWC: np.ndarray, chunk: int = 256) -> np.ndarray:
    """Mean squared pixel differences float64 [P, G] of uint8 pictures.

    Raises ValueError when the sizes differ.
    """
    if pictures_PHWC.shape[1:] != gallery_GHWC.shape[1:]:
        raise ValueError(
            f"pictures of {pictures_PHWC.shape[1:]} cannot be compared with drawings of {gallery_GHWC.shape[1:]}: resize them"
        )
    # |a|^2 - 2ab + |b|^2 is exact: sums of products of bytes are integers far below 2^53.
    pictures_PX = pictures_PHWC.reshape(len(pictures_PHWC), -1).astype(np.float64)
    norm_P1 = (pictures_PX**2).sum(axis=1, keepdims=True)
    pieces = []
    for start in range(0, len(gallery_GHWC), chunk):  # a gallery in float64 may not fit
        gallery_GX = gallery_GHWC[start : start + chunk].reshape(-1, pictures_PX.shape[1]).astype(np.float64)
        pieces.append(norm_P1 - 2 * pictures_PX @ gallery_GX.T + (gallery_GX**2).sum(axis=1))
    return np.concatenate(pieces, axis=1) / pictures_PX.shape[1]


def wilson(hits: int, trials: int, z: float = 1.959964) -> Proportion:
    """Wilson's score interval, 95 % by default; [0, 1] without trials."""
    if not trials:
        return Proportion(0, 0, 0.0, 1.0)
    share, scale = hits / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Proportion(hits, trials, max(0.0, centre - half), min(1.0, centre + half))


def _of_split(ranks: list[int]) -> SplitRetrieval:
    def within(limit: int) -> Proportion:
        return wilson(sum(rank <= limit for rank in ranks), len(ranks))

    return SplitRetrieval(within(1), within(5), float(np.median(ranks)))
