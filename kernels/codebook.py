"""Nearest entry of a dual codebook (TokenFlow's shared mapping, NextFlow section 2.1): one index names two entries.

    index(z) = argmin_k  semantic_weight * |z_semantic - e_semantic,k|^2  +  pixel_weight * |z_pixel - e_pixel,k|^2

`nearest_code` walks over the codebook in chunks and keeps the best entry so far, so that memory grows with N and not
with N x K. The squared distance is expanded, |z|^2 - 2 z.e + |e|^2, into one matrix product over the concatenated
parts. `nearest_codes` returns the several nearest entries with their distances. Both compute in fp32 whatever the
autocast.

N vectors, K entries, S semantic and P pixel channels (S may be 0), T entries asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Elements of the largest piece of the distance matrix that is ever in memory: 64 MiB in fp32."""


class NearestCodes(NamedTuple):
    """The nearest entries of each vector, nearest first."""

    index_NT: Tensor
    distance_NT: Tensor


@torch.no_grad()
def nearest_code(
    semantic_NS: Tensor,
    pixel_NP: Tensor,
    semantic_codebook_KS: Tensor,
    pixel_codebook_KP: Tensor,
    semantic_weight: float = 1.0,
    pixel_weight: float = 1.0,
) -> Tensor:
    """Index of the nearest entry, int64 [N]. Among equally near entries the lowest index wins."""
    with torch.autocast(semantic_NS.device.type, enabled=False):
        vectors_NC = _weighted(semantic_NS, pixel_NP, semantic_weight, pixel_weight)
        entries_KC = _weighted(semantic_codebook_KS, pixel_codebook_KP, semantic_weight, pixel_weight)
        best_N = vectors_NC.new_full((len(vectors_NC),), torch.inf)
        index_N = torch.zeros_like(best_N, dtype=torch.int64)
        for start, score_Nk in _scores(vectors_NC, entries_KC):
            smallest_N, position_N = score_Nk.min(dim=1)
            # strictly smaller: an equally near entry of an earlier chunk keeps its place
            index_N = torch.where(smallest_N < best_N, position_N + start, index_N)
            best_N = torch.minimum(smallest_N, best_N)
        return index_N


@torch.no_grad()
def nearest_codes(
    semantic_NS: Tensor,
    pixel_NP: Tensor,
    semantic_codebook_KS: Tensor,
    pixel_codebook_KP: Tensor,
    semantic_weight: float = 1.0,
    pixel_weight: float = 1.0,
    top_k: int = 1,
) -> NearestCodes:
    """The `top_k` nearest entries and their weighted squared distances, nearest first.

    Raises ValueError when `top_k` is larger than the codebook.
    """
    if not 1 <= top_k <= len(semantic_codebook_KS):
        raise ValueError(f"top_k must be between 1 and the codebook size {len(semantic_codebook_KS)}, got {top_k}")
    with torch.autocast(semantic_NS.device.type, enabled=False):
        vectors_NC = _weighted(semantic_NS, pixel_NP, semantic_weight, pixel_weight)
        entries_KC = _weighted(semantic_codebook_KS, pixel_codebook_KP, semantic_weight, pixel_weight)
        best_NT = vectors_NC.new_empty(len(vectors_NC), 0)
        index_NT = torch.empty(len(vectors_NC), 0, dtype=torch.int64, device=vectors_NC.device)
        for start, score_Nk in _scores(vectors_NC, entries_KC):
            scores = torch.cat([best_NT, score_Nk], dim=1)
            arange = torch.arange(start, start + score_Nk.shape[1], device=index_NT.device)
            indices = torch.cat([index_NT, arange.expand(len(scores), -1)], dim=1)
            best_NT, position_NT = scores.topk(min(top_k, scores.shape[1]), dim=1, largest=False)
            index_NT = indices.gather(1, position_NT)
        distance_NT = (best_NT + vectors_NC.square().sum(1, keepdim=True)).clamp_min(0)
        return NearestCodes(index_NT, distance_NT)


@torch.no_grad()
def nearest_code_ref(
    semantic_NS: Tensor,
    pixel_NP: Tensor,
    semantic_codebook_KS: Tensor,
    pixel_codebook_KP: Tensor,
    semantic_weight: float = 1.0,
    pixel_weight: float = 1.0,
) -> Tensor:
    """The whole distance matrix, as the formula reads. The yardstick of `nearest_code`, not for large N x K."""
    semantic_NK = (semantic_NS.float()[:, None] - semantic_codebook_KS.float()).square().sum(-1)
    pixel_NK = (pixel_NP.float()[:, None] - pixel_codebook_KP.float()).square().sum(-1)
    return (semantic_weight * semantic_NK + pixel_weight * pixel_NK).argmin(dim=1)


def _weighted(semantic_NS: Tensor, pixel_NP: Tensor, semantic_weight: float, pixel_weight: float) -> Tensor:
    """Both parts as one vector whose squared distance is the weighted sum of the parts' squared distances."""
    return torch.cat([semantic_NS.float() * semantic_weight**0.5, pixel_NP.float() * pixel_weight**0.5], dim=1)


def _scores(vectors_NC: Tensor, entries_KC: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yields (first entry, |e|^2 - 2 z.e) per chunk of entries: the distance but for |z|^2, which no entry changes."""
    size = max(1, CHUNK_ELEMENTS // max(1, len(vectors_NC)))
    for start in range(0, len(entries_KC), size):
        chunk_kC = entries_KC[start : start + size]
        yield start, torch.addmm(chunk_kC.square().sum(1), vectors_NC, chunk_kC.T, alpha=-2.0)
