"""All drawings of a data set, to name the one that a picture shows: the nearest by mean squared difference of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nextflow.evaluation.captions import words_of
from nextflow.evaluation.drawings import load_drawings
from nextflow.evaluation.retrieval import squared_distances


class Gallery:
    """The drawings below a folder of document shards (`drawings.load_drawings`).

    Some drawings are alike to the pixel (the flags of Norway and of Svalbard): those are one drawing here.
    """

    def __init__(self, folder: str | Path) -> None:
        drawings = load_drawings(folder)
        self.pixels_GHWC = np.stack([drawing.pixels_HWC for drawing in drawings])
        self.captions = [drawing.caption for drawing in drawings]
        first: dict[bytes, int] = {}
        places = [first.setdefault(drawing.pixels_HWC.tobytes(), place) for place, drawing in enumerate(drawings)]
        self.place = {drawing.key: place for drawing, place in zip(drawings, places)}
        """Place of each drawing by its key: the first of those that are alike."""
        self._by_words: dict[tuple[str, ...], set[int]] = {}
        for drawing, place in zip(drawings, places):
            self._by_words.setdefault(tuple(words_of(drawing.caption)), set()).add(place)

    def distances(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float64 [P, G] of pictures (uint8 [H, W, 3]); where sizes differ, at the smaller one."""
        distance_PG = np.zeros((len(pictures), len(self.captions)))
        places: dict[tuple[int, ...], list[int]] = {}
        for place, picture in enumerate(pictures):
            places.setdefault(min(picture.shape, self.pixels_GHWC.shape[1:], key=math.prod), []).append(place)
        for shape, members in places.items():
            drawings = [_resized(drawing, shape) for drawing in self.pixels_GHWC]
            chosen = [_resized(pictures[place], shape) for place in members]
            distance_PG[members] = squared_distances(np.stack(chosen), np.stack(drawings))
        return distance_PG

    def nearest(self, pictures: Sequence[np.ndarray]) -> list[int]:
        """Place of the drawing that each picture shows."""
        return [int(distance_G.argmin()) for distance_G in self.distances(pictures)]

    def ranks(self, pictures: Sequence[np.ndarray], keys: Sequence[str]) -> list[int]:
        """Rank of the drawing `keys[i]` among all for picture i, from 1; drawings of its caption are as right as itself."""
        ranks = []
        for distance_G, key in zip(self.distances(pictures), keys):
            right = distance_G[list(self.called(self.captions[self.place[key]]) | {self.place[key]})].min()
            ranks.append(int((distance_G < right).sum()) + 1)
        return ranks

    def called(self, caption: str) -> set[int]:
        """Places of the drawings with this caption; case and punctuation aside."""
        return self._by_words.get(tuple(words_of(caption)), set())


def _resized(pixels_HWC: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    if pixels_HWC.shape == tuple(shape):
        return pixels_HWC
    return np.asarray(Image.fromarray(pixels_HWC).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
