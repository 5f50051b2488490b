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

from nextflow.rewards.edit import fit
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


def _score(image_CHW: Tensor, known_CHW: Tensor | None) -> float:
    if known_CHW is None:
        return float("nan")
    difference = (image_CHW.float() / 255 - fit(known_CHW, image_CHW.shape[1:])).abs().mean()
    return float((1 - difference / LARGE_DIFFERENCE).clamp(min=0))
