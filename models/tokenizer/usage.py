"""How much of the codebook is in use and how far entries are from what they stand for, over all scales and per scale.

One index names an entry in the semantic and in the pixel codebook at once, so both codebooks have the same usage and
the same perplexity by construction. What differs is how well they fit: the error of each, per scale. It is the mean
squared distance of the normalised residual's part to the chosen entry's part, between 0 (equal) and 4 (opposite);
2 is what a right angle gives, no better than chance.

B images, N codes of an image, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from nextflow.sequence.scales import Grid


class UsageResult(NamedTuple):
    """Shares of entries used at least once, perplexities (the number of entries that even use would need), errors."""

    share: Tensor
    perplexity: Tensor
    share_S: Tensor
    perplexity_S: Tensor
    error_semantic_S: Tensor
    """nan without a semantic part and for a scale whose error was never given; the same for the pixel part."""
    error_pixel_S: Tensor


class CodebookUsage(Metric):
    """A torchmetrics metric (sums over ranks). Counts codes per scale; -1, the code of a dropped scale, is not counted."""

    full_state_update = False
    count_SK: Tensor
    error_S2: Tensor
    error_weight_S: Tensor

    def __init__(self, num_scales: int, codebook_size: int) -> None:
        super().__init__()
        self.add_state("count_SK", torch.zeros(num_scales, codebook_size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("error_S2", torch.zeros(num_scales, 2), dist_reduce_fx="sum")
        self.add_state("error_weight_S", torch.zeros(num_scales), dist_reduce_fx="sum")

    def update(self, codes_BN: Tensor, grids: Sequence[Grid], error_S2: Tensor | None = None) -> None:
        """Adds the flat codes of images with these grids, and their errors (`Encoding.error_S2`) where they are known."""
        sizes = [height * width for height, width in grids]
        for scale, codes in enumerate(codes_BN.split(sizes, dim=1)):
            self.count_SK[scale] += torch.bincount(codes[codes >= 0], minlength=self.count_SK.shape[1])
        if error_S2 is not None:
            weight_S = torch.tensor(sizes, device=error_S2.device) * float(len(codes_BN))
            self.error_S2[: len(sizes)] += error_S2 * weight_S[:, None]
            self.error_weight_S[: len(sizes)] += weight_S

    def compute(self) -> UsageResult:
        """Shares in [0, 1], perplexities in [1, K], errors in [0, 4]; 0, 1 and nan for a scale that was never seen."""
        count_SK, count_1K = self.count_SK.double(), self.count_SK.sum(0, keepdim=True).double()
        error_2S = (self.error_S2 / self.error_weight_S[:, None]).T  # 0 / 0 is nan
        return UsageResult(
            _share(count_1K)[0], _perplexity(count_1K)[0], _share(count_SK), _perplexity(count_SK), *error_2S
        )


def _share(count_SK: Tensor) -> Tensor:
    return (count_SK > 0).double().mean(1).float()


def _perplexity(count_SK: Tensor) -> Tensor:
    chance_SK = count_SK / count_SK.sum(1, keepdim=True).clamp_min(1)
    return torch.special.entr(chance_SK).sum(1).exp().float()
