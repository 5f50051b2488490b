"""How much of the codebook is in use, over all scales and per scale, as a torchmetrics metric (sums over ranks)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from nextflow.sequence.scales import Grid


class UsageResult(NamedTuple):
    """Shares of entries used at least once, and perplexities (the number of entries that even use would need)."""

    share: Tensor
    perplexity: Tensor
    share_S: Tensor
    perplexity_S: Tensor


class CodebookUsage(Metric):
    """Counts codes per scale; -1 (the code of a dropped scale) is not counted."""

    full_state_update = False
    count_SK: Tensor

    def __init__(self, num_scales: int, codebook_size: int) -> None:
        super().__init__()
        self.add_state("count_SK", torch.zeros(num_scales, codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes_BN: Tensor, grids: tuple[Grid, ...]) -> None:
        """Adds the flat codes of images with these grids."""
        for scale, codes in enumerate(codes_BN.split([height * width for height, width in grids], dim=1)):
            self.count_SK[scale] += torch.bincount(codes[codes >= 0], minlength=self.count_SK.shape[1])

    def compute(self) -> UsageResult:
        """Shares in [0, 1] and perplexities in [1, K]; 0 and 1 for a scale that was never seen."""
        count_SK, count_1K = self.count_SK.double(), self.count_SK.sum(0, keepdim=True).double()
        return UsageResult(_share(count_1K)[0], _perplexity(count_1K)[0], _share(count_SK), _perplexity(count_SK))


def _share(count_SK: Tensor) -> Tensor:
    return (count_SK > 0).double().mean(1).float()


def _perplexity(count_SK: Tensor) -> Tensor:
    chance_SK = count_SK / count_SK.sum(1, keepdim=True).clamp_min(1)
    return torch.special.entr(chance_SK).sum(1).exp().float()
