"""Rewards of composed scenes: right drawings, right number, right colours, right places, right background.

The prompt's metadata holds the scene it was made from (`datamodules/openmoji/scenes.py`), so every answer is exact: the picture
is read back with the very drawings (`scene_reader.py`) and what was found is compared with what was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nextflow.rewards.reward import Reward
from nextflow.rewards.scene_reader import SceneReader, SceneReading, scene_reader

Aspect = Literal["drawings", "count", "colour", "position", "background"]
BACKGROUND_TOLERANCE = 12.0
"""Mean difference of a channel, 0 to 255, up to which a background counts as the right one; the nearest two are 15 apart."""


class SceneReward(Reward):
    """One aspect of a scene, 0 to 1; NaN for prompts that are no scenes or do not ask for it."""

    def __init__(self, drawings: str, aspect: Aspect = "drawings") -> None:
        """
        Args:
            drawings: folder of the drawings that scenes are made of (`python -m nextflow.datamodules.openmoji.tiles`).
            aspect: "drawings": drawings that are asked for and found, over all that are asked for or found. "count": 1 less the
                error in their number, relative to it. "colour": as "drawings", but of colours; where colours are asked for.
                "position": drawings whose find has its centre in the box that it has in the known scene; where places are asked
                for. "background": the background's colour.
        """
        self.drawings, self.aspect = drawings, aspect

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N]."""
        if not any("objects" in known for known in metadata):
            return torch.full((len(images),), float("nan"))
        reader = scene_reader(self.drawings)
        score = _ASPECTS[self.aspect]
        return torch.tensor(
            [
                score(reading, known, reader) if "objects" in known else float("nan")
                for reading, known in zip(reader.read(images), metadata)
            ]
        )

    def masks(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Tensor | None]:
        """The boxes in which drawings are asked for."""
        return [_boxes(image, known) if "objects" in known else None for image, known in zip(images, metadata)]


def _drawings(reading: SceneReading, known: Mapping[str, Any], reader: SceneReader) -> float:
    return _agreement([found.hexcode for found in reading.found], [thing["hexcode"] for thing in known["objects"]])


def _count(reading: SceneReading, known: Mapping[str, Any], reader: SceneReader) -> float:
    asked = len(known["objects"])
    return max(0.0, 1 - abs(len(reading.found) - asked) / asked)


def _colour(reading: SceneReading, known: Mapping[str, Any], reader: SceneReader) -> float:
    asked = [group["colour"] for group in known["groups"] for _ in range(group["count"]) if group["colour"]]
    if not asked:
        return float("nan")
    colours = (reader.facts[found.hexcode]["colour"] for found in reading.found)
    return _agreement([colour for colour in colours if colour], asked)


def _position(reading: SceneReading, known: Mapping[str, Any], reader: SceneReader) -> float:
    if not any(group["place"] for group in known["groups"]):
        return float("nan")
    height, width = known["size"]
    left = list(reading.found)
    right = 0
    for thing in known["objects"]:
        x0, y0, x1, y1 = thing["box"]
        for found in left:
            x, y = found.centre
            if found.hexcode == thing["hexcode"] and x0 <= x * width <= x1 and y0 <= y * height <= y1:
                left.remove(found)
                right += 1
                break
    return right / len(known["objects"])


def _background(reading: SceneReading, known: Mapping[str, Any], reader: SceneReader) -> float:
    error = sum(abs(a - b) for a, b in zip(reading.background, known["background_rgb"])) / 3
    return float(error <= BACKGROUND_TOLERANCE)


_ASPECTS: dict[str, Callable[[SceneReading, Mapping[str, Any], SceneReader], float]] = {
    "drawings": _drawings,
    "count": _count,
    "colour": _colour,
    "position": _position,
    "background": _background,
}


def _agreement(found: Sequence[str], asked: Sequence[str]) -> float:
    """How many of two multisets agree, over the larger of them."""
    shared = sum((Counter(found) & Counter(asked)).values())
    return shared / max(len(found), len(asked))


def _boxes(image: Tensor, known: Mapping[str, Any]) -> Tensor:
    height, width = image.shape[1:]
    mask_HW = torch.zeros(height, width, dtype=torch.bool)
    down, across = height / known["size"][0], width / known["size"][1]
    for thing in known["objects"]:
        left, top, right, bottom = thing["box"]
        mask_HW[round(top * down) : round(bottom * down), round(left * across) : round(right * across)] = True
    return mask_HW
