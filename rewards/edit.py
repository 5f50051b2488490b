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

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nextflow.rewards.reference import fitted, nearness
from nextflow.rewards.reward import Reward

CHANGED_ABOVE = 0.1
"""Largest difference of a channel above which a pixel belongs to the edit."""


class _EditReward(Reward):
    def __init__(self, source: Literal[0, -1] = 0) -> None:
        """
        Args:
            source: which picture of the prompt is edited: 0 the first, -1 the last (examples in context).
        """
        self.source = source

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N], NaN where there is no edit with a known result."""
        edits = [self._edit_of(image, known) for image, known in zip(images, metadata)]
        return torch.tensor([float("nan") if edit is None else self._score(edit) for edit in edits])

    @abstractmethod
    def _score(self, edit: _Edit) -> float: ...

    def _edit_of(self, image_CHW: Tensor, known: Mapping[str, Any]) -> _Edit | None:
        sources, reference = known.get("sources") or (), known.get("reference")
        if not sources or reference is None:
            return None
        source_CHW, result_CHW = (fitted(picture, image_CHW.shape[1:]) for picture in (sources[self.source], reference))
        changed_HW = (source_CHW - result_CHW).abs().amax(dim=0) > CHANGED_ABOVE
        return _Edit(image_CHW.float() / 255, source_CHW, result_CHW, changed_HW)


class EditChangedReward(_EditReward):
    """How near the edited pixels are to the known result, 0 to 1."""

    def masks(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Tensor | None]:
        """The pixels of the edit."""
        edits = [self._edit_of(image, known) for image, known in zip(images, metadata)]
        return [None if edit is None else edit.changed_HW for edit in edits]

    def _score(self, edit: _Edit) -> float:
        if not edit.changed_HW.any():
            return float("nan")
        left = (edit.picture_CHW - edit.result_CHW).abs()[:, edit.changed_HW].mean()
        whole = (edit.source_CHW - edit.result_CHW).abs()[:, edit.changed_HW].mean()
        return float((1 - left / whole).clamp(min=0))


class EditKeptReward(_EditReward):
    """How little the other pixels have moved, 0 to 1."""

    def _score(self, edit: _Edit) -> float:
        if edit.changed_HW.all():
            return float("nan")
        return nearness((edit.picture_CHW - edit.source_CHW)[:, ~edit.changed_HW])


class _Edit(NamedTuple):
    picture_CHW: Tensor
    source_CHW: Tensor
    result_CHW: Tensor
    changed_HW: Tensor
