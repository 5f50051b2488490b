"""Keeps a codebook alive: data-driven first entries, running usage, revival of dead entries.

The paper does not say how entries start. Random entries far from all features are never chosen and never trained, so
the first training batch gives the entries, and entries that nobody uses move to features that are quantised badly.
Both draw from the batch of all ranks together (`row_draw`), as a function of the step alone: an interrupted run
continues as a straight one, and two processes with half a batch each do what one does with the whole batch.

K entries, B images of this rank, N residual vectors of an image over all scales, M = B * N, C channels of an entry
(semantic, then pixel).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from nextflow.models.tokenizer.ranks import sum_over_ranks
from nextflow.models.tokenizer.row_draw import best_row_of_each, best_rows, draw_keys
from nextflow.sequence.scales import Grid

if TYPE_CHECKING:
    from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer

FIRST_PASSES = 3
"""Times that the first entries are drawn: each pass sees the residuals that the entries of the pass before leave."""


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
        """Called before each training step: first entries on the first one, revival every `interval` steps.

        All ranks have to call it alike; their batches and grids may differ.
        """
        if not bool(self.pixel_ready) or (quantizer.semantic_dim and not bool(self.semantic_ready)):
            self._first_entries(quantizer, features_BCHW, grids)
            self.pixel_ready.fill_(True)
            self.semantic_ready.fill_(quantizer.semantic_dim > 0)
        elif self.interval and int(self.steps) % self.interval == 0:
            self._revive(quantizer, features_BCHW, grids)
        self.steps += 1

    @torch.no_grad()
    def count(self, indices_BN: Tensor) -> None:
        """Adds a step's codes (-1 = none) of all ranks to the running usage; 1 is an even share."""
        counts_K = torch.bincount(indices_BN[indices_BN >= 0], minlength=len(self.usage_K)).float()
        sum_over_ranks(counts_K)
        share_K = counts_K * (len(counts_K) / counts_K.sum().clamp_min(1))
        self.usage_K.lerp_(share_K, 1 - self.decay)

    def _first_entries(self, quantizer: DualCodebookQuantizer, features_BCHW: Tensor, grids: Sequence[Grid]) -> None:
        """Entries are residual vectors of the first batch, the residual of a scale being what earlier scales' entries leave.

        A pixel codebook that came from an earlier stage stays; each entry's semantic part is then that of a vector it
        is nearest to, or of a random one where it is nearest to none.
        """
        keep_pixel, semantic_weight = bool(self.pixel_ready), quantizer.semantic_weight
        quantizer.semantic_weight = 0.0 if keep_pixel else semantic_weight
        for draw in range(FIRST_PASSES):
            residuals = _residuals(quantizer, features_BCHW, grids)
            key_M = draw_keys(torch.ones_like(residuals.error_BN), int(self.steps) * FIRST_PASSES + draw)
            vectors_KC = best_rows(key_M, residuals.vectors_MC, quantizer.codebook_size)
            if keep_pixel:
                vectors_KC = best_row_of_each(key_M, residuals.codes_M, residuals.vectors_MC, vectors_KC)
            quantizer.semantic_codebook.copy_(vectors_KC[:, : quantizer.semantic_dim])
            if not keep_pixel:
                quantizer.pixel_codebook.copy_(vectors_KC[:, quantizer.semantic_dim :])
        quantizer.semantic_weight = semantic_weight
        if quantizer.average is not None and not keep_pixel:
            quantizer.average.forget(slice(None))

    def _revive(self, quantizer: DualCodebookQuantizer, features_BCHW: Tensor, grids: Sequence[Grid]) -> None:
        dead_k = (self.usage_K < self.below).nonzero().flatten()
        if len(dead_k) == 0:
            return
        residuals = _residuals(quantizer, features_BCHW, grids)
        key_M = draw_keys(residuals.error_BN + 1e-8, int(self.steps) * FIRST_PASSES)
        vectors_kC = best_rows(key_M, residuals.vectors_MC, len(dead_k))
        quantizer.semantic_codebook[dead_k] = vectors_kC[:, : quantizer.semantic_dim]
        quantizer.pixel_codebook[dead_k] = vectors_kC[:, quantizer.semantic_dim :]
        self.usage_K[dead_k] = 1.0
        if quantizer.average is not None:
            quantizer.average.forget(dead_k)


class _Residuals(NamedTuple):
    """Residual vectors of all scales, their nearest codes and the squared distances to them; M runs over (image, row)."""

    vectors_MC: Tensor
    codes_M: Tensor
    error_BN: Tensor


def _residuals(quantizer: DualCodebookQuantizer, features_BCHW: Tensor, grids: Sequence[Grid]) -> _Residuals:
    images = len(features_BCHW)
    steps = [step for _, step in quantizer.scales(features_BCHW, grids) if step is not None]
    vectors_BNC = torch.cat([step.vectors_NC.unflatten(0, (images, -1)) for step in steps], dim=1)
    entries_BNC = torch.cat([step.entries_NC.unflatten(0, (images, -1)) for step in steps], dim=1)
    codes_BN = torch.cat([step.fed_BN for step in steps], dim=1)
    return _Residuals(vectors_BNC.flatten(0, 1), codes_BN.flatten(), (vectors_BNC - entries_BNC).square().sum(2))
