"""Self-correction (NextFlow section 2.2): a generator is fed codes with errors and learns to repair them.

While an image is encoded, some fed codes are drawn among the nearest entries instead of being the nearest. The residual goes
on from the fed code and the target stays the nearest, so later scales learn to repair earlier ones.

Draws are functions of a seed per image, made of `Correction.seed` and the image's name. So an image's draws depend on no batch,
rank, worker or gradient accumulation, and an interrupted run makes them again.

B images, N codes of a scale of an image, T nearest entries to draw among, M = B * N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nextflow.sequence.draws import seed_of, uniforms


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How codes are corrupted."""

    fraction: float = 0.6
    """Share of the positions of each scale that are drawn; 0.6 is the paper's best."""
    top_k: int = 10
    """Number of nearest entries to draw among (the paper gives no value)."""
    temperature: float = 1.0
    """Temperature of softmax(-distance / temperature) over weighted squared distances (the paper gives no value)."""
    probability: float = 1.0
    """Share of the images that are corrected; 1.0 is the paper's best."""
    seed: int = 0
    """The draws of an image are a function of this and of its name."""

    def __post_init__(self) -> None:
        if not (0 <= self.fraction <= 1 and 0 <= self.probability <= 1):
            raise ValueError("correction.fraction and correction.probability must lie between 0 and 1")
        if self.top_k < 1 or self.temperature <= 0:
            raise ValueError("correction.top_k must be at least 1 and correction.temperature above 0")

    def seeds(self, names: Sequence[str | int], device: torch.device | str = "cpu") -> Tensor:
        """int64 [B]: the seed of each image, by its name."""
        return torch.tensor([seed_of(self.seed, name) for name in names], dtype=torch.int64, device=device)

    def chosen(self, seed_B: Tensor) -> Tensor:
        """Which images are corrected, bool [B]."""
        return uniforms(seed_B, 1)[:, 0] < self.probability

    def fed_codes(
        self, scale: int, distance_MT: Tensor, index_MT: Tensor, target_BN: Tensor, seed_B: Tensor, chosen_B: Tensor
    ) -> Tensor:
        """The codes of one scale that are fed: the targets, but at the drawn positions one of the `top_k` nearest.

        Args:
            scale: from 0.
            distance_MT: weighted squared distances to the nearest entries.
            index_MT: those entries.
            target_BN: the nearest.
            seed_B: of each image.
            chosen_B: which images are corrected.
        """
        num_codes = target_BN.shape[1]
        # Numbers of an image for each of its scales: one per position that orders them, then T per position for the draw.
        uniform_BX = uniforms(seed_B + 1 + scale, num_codes * (1 + distance_MT.shape[1]))
        order_BN = uniform_BX[:, :num_codes].argsort(dim=1)
        # The largest of logit + Gumbel noise is a draw from the softmax.
        gumbel_MT = -(-uniform_BX[:, num_codes:].log()).log().view_as(distance_MT)
        best_M1 = (gumbel_MT - distance_MT / self.temperature).argmax(dim=1, keepdim=True)
        drawn_BN = index_MT.gather(1, best_M1).view_as(target_BN)
        # Exactly this many positions of the scale, rounded: 60% of 1 code is 1, of 4 codes 2.
        drawn_here_BN = order_BN < round(self.fraction * num_codes)
        return torch.where(drawn_here_BN & chosen_B[:, None], drawn_BN, target_BN)


class CorrectedCodes(NamedTuple):
    """Codes of images under self-correction, beside their plain ones; equal to those where an image is not corrected."""

    input_N: Tensor
    """int64: the codes to feed."""
    target_N: Tensor
    """int64: the codes to predict: the nearest, given the codes fed before."""
