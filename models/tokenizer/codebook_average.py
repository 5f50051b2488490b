"""Codebook entries as running means of the vectors they stand for, in place of gradient steps.

VQ-VAE's alternative update (van den Oord et al. 2017, appendix A.1), which has no learning rate: with the decay d, and
in a step the n_k vectors z that were given entry k,

    weight_k <- d * weight_k + (1 - d) * n_k
    e_k      <- e_k + (1 - d) * sum(z - e_k) / weight_k

which is e_k = running sum / running count with the sum held as weight_k * e_k. Vectors of all used scales and of all
ranks count alike. An entry without vectors stays where it is.

K entries, M vectors of this rank, C channels of an entry (semantic, then pixel).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nextflow.models.tokenizer.ranks import sum_over_ranks

if TYPE_CHECKING:
    from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer


class CodebookAverage(nn.Module):
    """The running count of each entry. A kept entry starts as if one vector per step had been its own; a new one with none."""

    weight_K: Tensor

    def __init__(self, codebook_size: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("weight_K", torch.ones(codebook_size))

    @torch.no_grad()
    def update(self, quantizer: DualCodebookQuantizer, vectors_MC: Tensor, codes_M: Tensor) -> None:
        """Moves the entries by one step. All ranks have to call it alike."""
        ones_M1 = vectors_MC.new_ones(len(vectors_MC), 1)
        sums_KC = vectors_MC.new_zeros(len(self.weight_K), vectors_MC.shape[1] + 1)
        sums_KC.index_add_(0, codes_M, torch.cat([vectors_MC, ones_M1], dim=1))
        sum_over_ranks(sums_KC)
        sum_KC, count_K = sums_KC[:, :-1], sums_KC[:, -1]
        self.weight_K.lerp_(count_K, 1 - self.decay)
        share_K = torch.where(count_K > 0, (1 - self.decay) / self.weight_K, 0.0)
        parts = sum_KC.split([quantizer.semantic_dim, quantizer.pixel_dim], dim=1)
        for codebook, sum_of_part in zip((quantizer.semantic_codebook, quantizer.pixel_codebook), parts):
            codebook.addcmul_(share_K[:, None], sum_of_part - count_K[:, None] * codebook)

    def forget(self, entries: Tensor | slice) -> None:
        """New entries: the vectors of the next step alone decide where they go."""
        self.weight_K[entries] = 0.0
