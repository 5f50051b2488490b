"""Small files: the reward that needs no model, no data and no prompt, and shows that policy optimisation works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nextflow.rewards.picture_file import encode_picture
from nextflow.rewards.reward import Reward


class CompressibilityReward(Reward):
    """Minus the bits per pixel of the picture as a JPEG file. A negative weight in the mixture asks for large files."""

    def __init__(self, quality: int = 95) -> None:
        """
        Args:
            quality: of the JPEG file, 1 to 95.
        """
        if not 1 <= quality <= 95:
            raise ValueError(f"quality must lie in [1, 95], not {quality}")
        self.quality = quality

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N], at most 0."""
        return torch.tensor([-self._bits(image) / (image.shape[1] * image.shape[2]) for image in images])

    def _bits(self, image_CHW: Tensor) -> float:
        return 8.0 * len(encode_picture(image_CHW, "JPEG", quality=self.quality))
