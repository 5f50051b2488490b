"""Entropy of soft code choices (MaskGIT's and LFQ's regulariser): every vector sure of its code, all codes used.

    p_n = softmax(-distance(z_n, e) / temperature)        loss = mean_n H(p_n) - H(mean_n p_n)

The mean is over the vectors of all ranks (each rank's own mean weighing the same). With q = mean_n p_n held constant
the loss is mean_n sum_k p_nk (log q_k - log p_nk), with the same value and the same gradient: one pass over chunks of
vectors finds q, a second one the loss together with its gradient. Memory does not grow with N * K.

N vectors of this rank, n of a chunk, K entries, C channels of an entry.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nextflow.models.tokenizer.ranks import num_ranks, sum_over_ranks

CHUNK_ELEMENTS = 1 << 20
"""Elements of the largest piece of the N x K choices in memory: 4 MiB in fp32, and a few pieces at a time."""


def entropy_loss(vectors_NC: Tensor, entries_KC: Tensor, temperature: float) -> Tensor:
    """Scalar in [-log K, 0]; differentiable once with respect to vectors and entries.

    Args:
        vectors_NC: fp32 vectors; distances are squared and Euclidean, so parts of unequal weight come scaled by its root.
        entries_KC: fp32 entries, scaled alike.
        temperature: the lower, the nearer the soft choice is to the hard one.
    """
    count, log_mean_K = len(vectors_NC), _log_mean_choice(vectors_NC, entries_KC, temperature)
    with torch.no_grad():
        gradient_NC, gradient_KC = torch.zeros_like(vectors_NC), torch.zeros_like(entries_KC)
        loss = entries_KC.new_zeros(())
        for rows, logits_nK in _logits(vectors_NC, entries_KC, temperature):
            ratio_nK = logits_nK.log_softmax(1)
            p_nK = ratio_nK.exp()
            ratio_nK -= log_mean_K
            information_n = torch.linalg.vecdot(p_nK, ratio_nK)
            loss -= information_n.sum() / count
            # d loss / d logits; its rows sum to 0, so |z|^2 drops out of the gradient as out of the choice
            slope_nK = ratio_nK.neg_().add_(information_n[:, None]).mul_(p_nK).mul_(2 / temperature / count)
            gradient_NC[rows] = slope_nK @ entries_KC
            gradient_KC += slope_nK.T @ vectors_NC[rows] - slope_nK.sum(0)[:, None] * entries_KC
    # the value and, through terms whose value is 0, the gradient
    pull = (gradient_NC * (vectors_NC - vectors_NC.detach())).sum()
    return loss + pull + (gradient_KC * (entries_KC - entries_KC.detach())).sum()


@torch.no_grad()
def _log_mean_choice(vectors_NC: Tensor, entries_KC: Tensor, temperature: float) -> Tensor:
    """log q [K], over all ranks."""
    mean_K = entries_KC.new_zeros(len(entries_KC))
    for _, logits_nK in _logits(vectors_NC, entries_KC, temperature):
        mean_K += logits_nK.softmax(1).sum(0) / len(vectors_NC)
    return (sum_over_ranks(mean_K) / num_ranks()).clamp_min(1e-38).log()


def _logits(vectors_NC: Tensor, entries_KC: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, -distance / temperature but for |z|^2, which softmax does not see) per chunk of vectors."""
    square_K = entries_KC.square().sum(1)
    size = max(1, CHUNK_ELEMENTS // len(entries_KC))
    for start in range(0, len(vectors_NC), size):
        rows = slice(start, start + size)
        product_nK = torch.addmm(square_K, vectors_NC[rows], entries_KC.T, beta=-1, alpha=2)
        yield rows, product_nK.div_(temperature)
