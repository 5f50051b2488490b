"""Keeps a codebook alive: data-driven first entries, running usage, revival of dead entries.

The paper does not say how entries start. Random entries far from all features are never chosen and never trained, so
the first training batch gives the entries, and entries that nobody uses move to features that are quantised badly.
Draws are a function of the step alone, so an interrupted run continues as a straight one; rank 0's entries go to all
ranks.

K entries, M residual vectors of all scales of a batch, C channels of an entry (semantic, then pixel).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextflow.sequence.scales import Grid

if TYPE_CHECKING:
    from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer


class CodebookHealth(nn.Module):
    """How often each entry was used of late, and which parts of the codebook still wait for their first entries."""

    usage_K: Tensor
    steps: Tensor
    semantic_ready: Tensor
    pixel_ready: Tensor

    def __init__(self, codebook_size: int, *, interval: int, below: float, decay: float) -> None:
        super().__init__()
        self.interval, self.below, self.decay = interval, below, decay
        self.register_buffer("usage_K", torch.ones(codebook_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("semantic_ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("pixel_ready", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def refresh(self, quantizer: DualCodebookQuantizer, features_BCHW: Tensor, grids: Sequence[Grid]) -> None:
        """Called before each training step: first entries on the first one, revival every `interval` steps."""
        generator = torch.Generator().manual_seed(int(self.steps))
        if not bool(self.pixel_ready) or (quantizer.semantic_dim and not bool(self.semantic_ready)):
            self._first_entries(quantizer, features_BCHW, grids, generator)
            self.pixel_ready.fill_(True)
            self.semantic_ready.fill_(quantizer.semantic_dim > 0)
            _from_rank_0(quantizer.semantic_codebook, quantizer.pixel_codebook)
        elif self.interval and int(self.steps) % self.interval == 0:
            self._revive(quantizer, features_BCHW, grids, generator)
        self.steps += 1

    @torch.no_grad()
    def count(self, indices_BN: Tensor) -> None:
        """Adds a step's codes (-1 = none) to the running usage; 1 is an even share."""
        counts_K = torch.bincount(indices_BN[indices_BN >= 0], minlength=len(self.usage_K)).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_K)
        share_K = counts_K * (len(counts_K) / counts_K.sum().clamp_min(1))
        self.usage_K.lerp_(share_K, 1 - self.decay)

    def _first_entries(
        self, quantizer: DualCodebookQuantizer, features_BCHW: Tensor, grids: Sequence[Grid], generator: torch.Generator
    ) -> None:
        """Entries are residual vectors of the first batch, the residual of a scale being what earlier scales' entries leave.

        A pixel codebook that came from an earlier stage stays; each entry's semantic part is then that of a vector it
        is nearest to, or of a random one where it is nearest to none.
        """
        keep_pixel, semantic_weight = bool(self.pixel_ready), quantizer.semantic_weight
        quantizer.semantic_weight = 0.0 if keep_pixel else semantic_weight
        for _ in range(3):  # each pass sees the residuals that the entries of the pass before leave
            vectors_MC, codes_M, _ = _residuals(quantizer, features_BCHW, grids)
            chosen_K = _draw(torch.ones(len(vectors_MC)), quantizer.codebook_size, generator).to(codes_M.device)
            if keep_pixel:
                shuffled_M = torch.randperm(len(codes_M), generator=generator).to(codes_M.device)
                chosen_K[codes_M[shuffled_M]] = shuffled_M
            self._write(quantizer, slice(None), vectors_MC[chosen_K], keep_pixel=keep_pixel)
        quantizer.semantic_weight = semantic_weight

    def _revive(
        self, quantizer: DualCodebookQuantizer, features_BCHW: Tensor, grids: Sequence[Grid], generator: torch.Generator
    ) -> None:
        dead = (self.usage_K < self.below).nonzero().flatten()
        if len(dead) == 0:
            return
        vectors_MC, _, error_M = _residuals(quantizer, features_BCHW, grids)
        chosen = _draw(error_M.cpu() + 1e-8, len(dead), generator).to(dead.device)
        self._write(quantizer, dead, vectors_MC[chosen])
        self.usage_K[dead] = 1.0
        _from_rank_0(quantizer.semantic_codebook, quantizer.pixel_codebook)

    def _write(
        self, quantizer: DualCodebookQuantizer, where: Tensor | slice, vectors_KC: Tensor, keep_pixel: bool = False
    ) -> None:
        semantic_KS, pixel_KP = vectors_KC.split([quantizer.semantic_dim, quantizer.pixel_dim], dim=1)
        quantizer.semantic_codebook[where] = semantic_KS
        if not keep_pixel:
            quantizer.pixel_codebook[where] = pixel_KP


def _residuals(
    quantizer: DualCodebookQuantizer, features_BCHW: Tensor, grids: Sequence[Grid]
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual vectors [M, C] of all scales, their nearest codes [M] and the squared distances to them [M]."""
    steps = [step for _, step in quantizer.scales(features_BCHW, grids) if step is not None]
    vectors_MC = torch.cat([step.vectors_NC for step in steps])
    entries_MC = torch.cat([step.entries_NC for step in steps])
    codes_M = torch.cat([step.fed_BN.flatten() for step in steps])
    return vectors_MC, codes_M, (vectors_MC - entries_MC).square().sum(1)


def _draw(weight_M: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` row numbers drawn by weight, without repetition while there are enough rows."""
    if len(weight_M) > 1 << 24:  # the limit of torch.multinomial
        weight_M = weight_M[: 1 << 24]
    return torch.multinomial(weight_M, count, replacement=count > len(weight_M), generator=generator)


def _from_rank_0(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)
