"""Nearest entry of a dual codebook (TokenFlow's shared mapping, NextFlow section 2.1): one index names two entries.

    index(z) = argmin_k  semantic_weight * |z_semantic - e_semantic,k|^2  +  pixel_weight * |z_pixel - e_pixel,k|^2

The squared distance is expanded, |z|^2 - 2 z.e + |e|^2, into one matrix product over the concatenated parts; |z|^2 changes
nothing in the choice. Memory grows with N and with K but not with N x K. Everything is fp32 whatever the autocast.

    chunked   tiles of the score matrix that stay in the cache between their product and their minimum. Runs everywhere;
              on CUDA its products are as exact as `torch.set_float32_matmul_precision` asks (TF32 is off unless set).
    triton    one kernel keeps the best entry so far in registers (`codebook_triton.py`), always fp32. CUDA.

`nearest_codes` returns the several nearest entries with their distances; it is always chunked.

N vectors, K entries, S semantic and P pixel channels (S may be 0), C = S + P, T entries asked for. A tile is n vectors by
k entries, V windows of W entries each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Literal["auto", "chunked", "triton", "reference"]

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores of one tile, on a CPU for each thread: 4 MiB, so that the minimum finds them in the cache."""
TILE_ENTRIES = 2048
"""Entries of a tile where there are vectors enough to fill it: a squarer tile spends longer on indices."""
WINDOW = 64
"""Neighbouring entries W whose minimum is taken without an index, which is many times faster than with one."""


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
    implementation: Implementation = "auto",
) -> Tensor:
    """Index of the nearest entry, int64 [N]. Among entries of equal score the lowest index wins.

    Entries whose distances differ by rounding alone may change places between implementations.

    Args:
        implementation: "auto" takes triton on CUDA where it is installed and chunked elsewhere; a named one runs or raises.

    Raises:
        ValueError: `implementation` cannot run on this device.
        ImportError: "triton" was asked for and is not installed.
    """
    parts = semantic_NS, pixel_NP, semantic_codebook_KS, pixel_codebook_KP
    if implementation == "auto":
        implementation = "triton" if semantic_NS.is_cuda and find_spec("triton") else "chunked"
    if implementation == "reference":
        return nearest_code_ref(*parts, semantic_weight, pixel_weight)
    if implementation not in ("chunked", "triton"):
        raise ValueError(f"nearest_code: {implementation!r} is none of 'auto', 'chunked', 'triton', 'reference'")
    with torch.autocast(semantic_NS.device.type, enabled=False):
        search = _search(*parts, semantic_weight, pixel_weight)
        return _chunked(search) if implementation == "chunked" else _triton().nearest(*search)


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
        search = _search(semantic_NS, pixel_NP, semantic_codebook_KS, pixel_codebook_KP, semantic_weight, pixel_weight)
        best_NT = search.vectors_NC.new_full((len(semantic_NS), top_k), torch.inf)
        index_NT = torch.zeros_like(best_NT, dtype=torch.int64)
        for rows, start, score_nk in _tiles(search):
            near = _candidates(score_nk, top_k)
            best_NT[rows], chosen_nT = torch.cat([best_NT[rows], near.score_nM], dim=1).topk(top_k, largest=False)
            index_NT[rows] = torch.cat([index_NT[rows], near.position_nM + start], dim=1).gather(1, chosen_nT)
        square_N = semantic_weight * semantic_NS.float().square().sum(1)
        square_N += pixel_weight * pixel_NP.float().square().sum(1)
        return NearestCodes(index_NT, (best_NT + square_N[:, None]).clamp_min(0))


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


class _Search(NamedTuple):
    """score = bias + vectors entries^T is the weighted squared distance less the part that no entry changes."""

    vectors_NC: Tensor
    """-2 weight z."""
    entries_KC: Tensor
    bias_K: Tensor
    """weight |e|^2, summed over both parts."""


def _search(
    semantic_NS: Tensor,
    pixel_NP: Tensor,
    semantic_codebook_KS: Tensor,
    pixel_codebook_KP: Tensor,
    semantic_weight: float,
    pixel_weight: float,
) -> _Search:
    semantic_KS, pixel_KP = semantic_codebook_KS.float(), pixel_codebook_KP.float()
    # a norm, squared: the squares of all entries would be a temporary as large as the codebook
    bias_K = semantic_weight * torch.linalg.vector_norm(semantic_KS, dim=1).square_()
    bias_K += pixel_weight * torch.linalg.vector_norm(pixel_KP, dim=1).square_()
    vectors_NC = torch.cat([semantic_NS.float() * (-2 * semantic_weight), pixel_NP.float() * (-2 * pixel_weight)], 1)
    return _Search(vectors_NC, torch.cat([semantic_KS, pixel_KP], dim=1), bias_K)


def _chunked(search: _Search) -> Tensor:
    best_N = search.vectors_NC.new_full((len(search.vectors_NC),), torch.inf)
    index_N = torch.zeros_like(best_N, dtype=torch.int64)
    for rows, start, score_nk in _tiles(search):
        smallest_n, position_n = _minimum(score_nk)
        # strictly smaller: an equally near entry of an earlier tile keeps its place
        index_N[rows] = torch.where(smallest_n < best_N[rows], position_n + start, index_N[rows])
        best_N[rows] = torch.minimum(smallest_n, best_N[rows])
    return index_N


class _Minimum(NamedTuple):
    score_n: Tensor
    position_n: Tensor


def _minimum(score_nk: Tensor) -> _Minimum:
    """Smallest score of each vector and its first position, which is looked for in the best window alone."""
    n, k = score_nk.shape
    smallest_n, window_n = score_nk.view(n, -1, WINDOW).amin(2).min(dim=1)
    first_n = torch.arange(0, n * k // WINDOW, k // WINDOW, device=score_nk.device)
    inside_n = score_nk.view(-1, WINDOW).index_select(0, first_n + window_n).argmin(dim=1)
    return _Minimum(smallest_n, window_n * WINDOW + inside_n)


class _Candidates(NamedTuple):
    score_nM: Tensor
    position_nM: Tensor


def _candidates(score_nk: Tensor, top_k: int) -> _Candidates:
    """Scores among which the `top_k` smallest are: those of the `top_k` windows whose minima are smallest."""
    score_nVW = score_nk.unflatten(1, (-1, WINDOW))
    if score_nVW.shape[1] < 4 * top_k:  # choosing windows would cost more than it saves
        return _Candidates(score_nk, torch.arange(score_nk.shape[1], device=score_nk.device).expand_as(score_nk))
    window_nT1 = score_nVW.amin(2).topk(top_k, dim=1, largest=False).indices[:, :, None]
    position_nTW = window_nT1 * WINDOW + torch.arange(WINDOW, device=score_nk.device)
    return _Candidates(score_nVW.take_along_dim(window_nT1, dim=1).flatten(1), position_nTW.flatten(1))


def _tiles(search: _Search) -> Iterator[tuple[slice, int, Tensor]]:
    """Yields (vectors, first entry, scores [n, k]); the scores are overwritten by the next tile's."""
    vectors_NC, entries_KC, bias_K = search
    if missing := -len(entries_KC) % WINDOW:  # entries that are never nearest fill the last window
        entries_KC, bias_K = F.pad(entries_KC, (0, 0, 0, missing)), F.pad(bias_K, (0, missing), value=torch.inf)
    device = vectors_NC.device.type
    elements = TILE_ELEMENTS.get(device, 1 << 26) * (torch.get_num_threads() if device == "cpu" else 1)
    height = max(1, min(len(vectors_NC), elements // TILE_ENTRIES))
    width = min(len(entries_KC), max(1, elements // height // WINDOW) * WINDOW)
    buffer = vectors_NC.new_empty(height * width)
    for row in range(0, len(vectors_NC), height):
        rows = slice(row, row + height)
        vectors_nC = vectors_NC[rows]
        for start in range(0, len(entries_KC), width):
            entries_kC = entries_KC[start : start + width]
            score_nk = buffer[: len(vectors_nC) * len(entries_kC)].view(len(vectors_nC), len(entries_kC))
            yield rows, start, torch.addmm(bias_K[start : start + width], vectors_nC, entries_kC.T, out=score_nk)


@cache
def _triton() -> ModuleType:
    try:
        from nextflow.kernels import codebook_triton
    except ImportError as error:
        raise ImportError(
            f"nearest_code: 'triton' cannot be imported ({error}); install triton, or use 'auto' or 'chunked'"
        ) from error
    return codebook_triton
