"""How near a picture is to the one that is known to be right, such as the scene that a caption was made of.

    1 - |P - T| / 0.25, at least 0:   1 for the known picture, 0 from a mean difference of a quarter of the range on

P picture, T known picture, in [0, 1]; NaN where none is known. It sees each pixel, so that every answer of a group gets another
score: more to learn from than an exact reading (`scene.py`), which has no word for nearly right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.rewards.reward import Reward

LARGE_DIFFERENCE = 0.25
"""Mean difference of a channel that is worth nothing."""


class ReferenceReward(Reward):
    """Nearness to the known picture, 0 to 1."""

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N], NaN where no picture is known."""
        return torch.tensor([_score(image, known.get("reference")) for image, known in zip(images, metadata)])


def nearness(difference: Tensor) -> float:
    """1 where pictures do not differ, 0 from a mean difference (of values in [0, 1]) of `LARGE_DIFFERENCE` on."""
    return float((1 - difference.abs().mean() / LARGE_DIFFERENCE).clamp(min=0))


def fitted(image_CHW: Tensor, size: Sequence[int]) -> Tensor:
    """A uint8 picture in [0, 1], resized where its (height, width) is another."""
    image = image_CHW.float() / 255
    if image.shape[1:] == torch.Size(size):
        return image
    return F.interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0]


def _score(image_CHW: Tensor, known_CHW: Tensor | None) -> float:
    if known_CHW is None:
        return float("nan")
    return nearness(image_CHW.float() / 255 - fitted(known_CHW, image_CHW.shape[1:]))
