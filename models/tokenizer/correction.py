"""Self-correction of codes (NextFlow section 2.2): a generator is fed codes with errors and learns to repair them.

B images, N codes of an image and scale, T nearest entries to draw among.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nextflow.kernels.codebook import NearestCodes


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Self-correction (NextFlow section 2.2): some fed codes are drawn among the nearest instead of being the nearest.

    The residual continues from the fed code and the target stays the nearest, so later scales learn to repair earlier
    ones.
    """

    fraction: float = 0.6
    """Share of the positions of each scale that are drawn; 0.6 is the paper's best."""
    top_k: int = 10
    """Number of nearest entries to draw among (the paper gives no value)."""
    temperature: float = 1.0
    """Temperature of softmax(-distance / temperature) over weighted squared distances (the paper gives no value)."""
    probability: float = 1.0
    """Share of the images that are corrected; 1.0 is the paper's best."""

    def __post_init__(self) -> None:
        if not (0 <= self.fraction <= 1 and 0 <= self.probability <= 1):
            raise ValueError("correction.fraction and correction.probability must lie between 0 and 1")
        if self.top_k < 1 or self.temperature <= 0:
            raise ValueError("correction.top_k must be at least 1 and correction.temperature above 0")

    def chosen_images(self, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Which of `count` images are corrected, bool [B]; drawn from `generator`, which lies on `device`."""
        return torch.rand(count, generator=generator, device=device) < self.probability

    def fed_codes(
        self, near: NearestCodes, target_BN: Tensor, corrected_B: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The codes of one scale that are fed: the targets, but at the drawn positions one of the `top_k` nearest."""
        chance_NT = torch.softmax(-near.distance_NT / self.temperature, dim=1)
        drawn_BN = near.index_NT.gather(1, torch.multinomial(chance_NT, 1, generator=generator)).view_as(target_BN)
        # exactly this many positions of the scale, rounded: 60% of 1 code is 1, of 4 codes 2
        count = round(self.fraction * target_BN.shape[1])
        order_BN = torch.rand(target_BN.shape, generator=generator, device=target_BN.device).argsort(dim=1)
        return torch.where((order_BN < count) & corrected_B[:, None], drawn_BN, target_BN)
