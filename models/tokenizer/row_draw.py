"""Draws rows of a batch that is spread over ranks, exactly as one process would that holds all of it.

Every row gets a key, log(weight) + Gumbel noise; the rows of the largest keys are a draw by weight without repetition
(the "Gumbel-top-k trick", Kool et al. 2019, arXiv 1903.06059). The noise is a function of (seed, number of the image
in the global batch, row inside the image) alone, so it does not matter which rank holds a row. Rank 0's images come
first in the global batch, then rank 1's. Keys are float64 and made on the CPU: equal on all devices, and never equal
to each other.

B images of this rank, N rows of an image, M = B * N, C channels of a row, K rows asked for, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextflow.models.tokenizer.ranks import gather_over_ranks, max_over_ranks, num_ranks, rank, sum_over_ranks
from nextflow.sequence.draws import mix, uniforms


def draw_keys(weight_BN: Tensor, seed: int) -> Tensor:
    """Keys [M] of this rank's rows, on the CPU; ranks may differ in B and N. A row of weight 0 is never drawn."""
    num_images, num_rows = weight_BN.shape
    images_R = gather_over_ranks(torch.tensor(num_images, device=weight_BN.device)).cpu()
    image_B = images_R[: rank()].sum() + torch.arange(num_images)
    uniform_BN = uniforms(mix(torch.tensor(seed)) + image_B, num_rows)
    return (weight_BN.cpu().double().log() - (-uniform_BN.log()).log()).flatten()


def best_rows(key_M: Tensor, rows_MC: Tensor, count: int) -> Tensor:
    """[count, C]: rows of the largest keys of all ranks, largest first; in turn again where there are fewer than `count`.

    Raises ValueError when no key is finite.
    """
    own_k, index_k = key_M.topk(min(count, len(key_M)))
    padded_K = torch.full((count,), -torch.inf, dtype=torch.float64)
    padded_K[: len(own_k)] = own_k
    if num_ranks() > 1:  # every rank sees all candidates; the owner of each winner hands its row to all
        padded_K = gather_over_ranks(padded_K.to(rows_MC.device)).flatten().cpu()
    best_K, position_K = padded_K.topk(count)
    won_K = (position_K // count == rank()) & best_K.isfinite()
    rows_KC = rows_MC.new_zeros(count, rows_MC.shape[1])
    won_index = index_k[position_K[won_K] - rank() * count]
    rows_KC[won_K.to(rows_MC.device)] = rows_MC[won_index.to(rows_MC.device)]
    sum_over_ranks(rows_KC)
    drawn = int(best_K.isfinite().sum())
    if drawn == 0:
        raise ValueError("features before quantisation are not finite: training has diverged, lower the learning rate")
    return rows_KC[torch.arange(count, device=rows_MC.device) % drawn]


def best_row_of_each(key_M: Tensor, entry_M: Tensor, rows_MC: Tensor, rows_KC: Tensor) -> Tensor:
    """`rows_KC` with, in place of row k, the row of the largest key among all ranks' rows with `entry_M` k, if there is one."""
    entry_M = entry_M.cpu()
    best_K = torch.full((len(rows_KC),), -torch.inf, dtype=torch.float64).scatter_reduce_(0, entry_M, key_M, "amax")
    if num_ranks() > 1:
        best_K = max_over_ranks(best_K.to(rows_MC.device)).cpu()
    won_M = key_M == best_K[entry_M]
    found_KC = torch.zeros_like(rows_KC)
    found_KC[entry_M[won_M].to(rows_MC.device)] = rows_MC[won_M.to(rows_MC.device)]
    found_K = best_K.isfinite().to(rows_MC.device)
    return torch.where(found_K[:, None], sum_over_ranks(found_KC), rows_KC)
