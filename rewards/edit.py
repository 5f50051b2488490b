"""Rewards of edits whose result is known: what should have changed has, and the rest is as it was.

The pixels in which the source and the known result differ are the edit; all others are the rest. S source, T known result, P
picture, all in [0, 1]:

    changed = 1 - |P - T| / |S - T|  over the edit, at least 0:  1 for the result, 0 for the source as it was
    kept    = 1 - |P - S| / 0.25     over the rest, at least 0:  1 where nothing moved

Both are NaN where the prompt has no source picture or no known result. A source of another size than the picture is resized.
Of several pictures in a prompt the first is what is edited, and the others what it takes from; with examples in context it is
the last one, behind the examples: `source: -1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.rewards.reward import Reward

CHANGED_ABOVE = 0.1
"""Largest difference of a channel above which a pixel belongs to the edit."""
LARGE_CHANGE = 0.25
"""Mean difference of the rest that counts as everything lost."""


class EditChangedReward(Reward):
    """How near the edited pixels are to the known result, 0 to 1."""

    def __init__(self, source: int = 0) -> None:
        """
        Args:
            source: which picture of the prompt is edited: 0 the first, -1 the last (examples in context).
        """
        self.source = source

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N], NaN where there is no edit with a known result."""
        return torch.tensor([self._score(image, known) for image, known in zip(images, metadata)])

    def masks(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Tensor | None]:
        """The pixels of the edit."""
        edits = [_edit_of(image, known, self.source) for image, known in zip(images, metadata)]
        return [None if edit is None else edit.changed_HW for edit in edits]

    def _score(self, image_CHW: Tensor, known: Mapping[str, Any]) -> float:
        edit = _edit_of(image_CHW, known, self.source)
        if edit is None or not edit.changed_HW.any():
            return float("nan")
        left = (edit.picture_CHW - edit.result_CHW).abs()[:, edit.changed_HW].mean()
        whole = (edit.source_CHW - edit.result_CHW).abs()[:, edit.changed_HW].mean()
        return float((1 - left / whole).clamp(min=0))


class EditKeptReward(Reward):
    """How little the other pixels have moved, 0 to 1."""

    def __init__(self, source: int = 0) -> None:
        """
        Args:
            source: which picture of the prompt is edited: 0 the first, -1 the last (examples in context).
        """
        self.source = source

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N], NaN where there is no edit with a known result."""
        return torch.tensor([self._score(image, known) for image, known in zip(images, metadata)])

    def _score(self, image_CHW: Tensor, known: Mapping[str, Any]) -> float:
        edit = _edit_of(image_CHW, known, self.source)
        if edit is None or edit.changed_HW.all():
            return float("nan")
        moved = (edit.picture_CHW - edit.source_CHW).abs()[:, ~edit.changed_HW].mean()
        return float((1 - moved / LARGE_CHANGE).clamp(min=0))


class _Edit(NamedTuple):
    picture_CHW: Tensor
    source_CHW: Tensor
    result_CHW: Tensor
    changed_HW: Tensor


def _edit_of(image_CHW: Tensor, known: Mapping[str, Any], source: int) -> _Edit | None:
    sources, reference = known.get("sources") or (), known.get("reference")
    if not sources or reference is None:
        return None
    source_CHW, result_CHW = (fit(picture, image_CHW.shape[1:]) for picture in (sources[source], reference))
    changed_HW = (source_CHW - result_CHW).abs().amax(dim=0) > CHANGED_ABOVE
    return _Edit(image_CHW.float() / 255, source_CHW, result_CHW, changed_HW)


def fit(image_CHW: Tensor, size: Sequence[int]) -> Tensor:
    """A picture (uint8) in [0, 1], resized where its size is another."""
    image = image_CHW.float() / 255
    if image.shape[1:] == torch.Size(size):
        return image
    return F.interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0]
