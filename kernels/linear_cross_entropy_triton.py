"""`linear_cross_entropy` in Triton, logits made tile by tile; the op itself is in `linear_cross_entropy.py`.

Forward: a program takes a tile of tokens and a share of the vocabulary, walks over it and keeps the running maximum m,
s = sum exp(l - m), and u = sum exp(l - m) (l - m) for the entropy; the shares are put together afterwards. Backward: logits are
made again, turned into their gradient and written in the dtype of the products, for one part of the vocabulary at a time;
two plain matrix products per part make the gradients of x and W. The equations are in `linear_cross_entropy_chunked.py`.

Shapes: N tokens, D width, V vocabulary, S shares of the vocabulary, P ids of a part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nextflow.kernels.linear_cross_entropy import LinearCrossEntropy

PART_ELEMENTS = 2**27
"""Gradients of logits that the backward pass writes at a time: 256 MiB in 16 bits."""


class Tile(NamedTuple):
    """Sizes of a program: tokens, ids, and channels of one step of the matrix product."""

    tokens: int
    ids: int
    channels: int


def cross_entropy_triton(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, token_weight_N: Tensor | None, entropy: bool
) -> LinearCrossEntropy:
    """`linear_cross_entropy` of tokens that all have a target; x has the dtype of the products."""
    loss_N, correct_N, entropy_N = _CrossEntropy.apply(x_ND, weight_VD, target_N, entropy)
    if token_weight_N is None:
        return LinearCrossEntropy(loss_N, correct_N, loss_N.sum(), entropy_N)
    total = (loss_N * token_weight_N).sum()
    return LinearCrossEntropy(loss_N.detach(), correct_N, total, None if entropy_N is None else entropy_N.detach())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, entropy: bool):
        x_ND, weight_VD, target_N = x_ND.contiguous(), weight_VD.contiguous(), target_N.contiguous()
        (N, D), V, tile = x_ND.shape, len(weight_VD), _tile(x_ND)
        shares = _shares(N, V, tile, x_ND.device)
        share = triton.cdiv(triton.cdiv(V, tile.ids), shares) * tile.ids
        top_SN, sum_SN, moment_SN = torch.empty(3, shares, N, dtype=torch.float32, device=x_ND.device)
        target_logit_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
        if N:
            grid, results = (triton.cdiv(N, tile.tokens), shares), (top_SN, sum_SN, moment_SN, target_logit_N)
            # Triton starts on the current device, which need not be the tensors'.
            with torch.cuda.device_of(x_ND):
                _forward_kernel[grid](
                    x_ND, weight_VD, target_N, *results, N, V, D, share, ENTROPY=entropy, **_options(x_ND, tile)
                )
        top_N = top_SN.amax(0)
        shift_SN = top_SN - top_N
        scale_SN = shift_SN.exp()
        sum_N = (sum_SN * scale_SN).sum(0)
        lse_N = top_N + sum_N.log()
        entropy_N = None
        if entropy:
            entropy_N = sum_N.log() - ((moment_SN + sum_SN * shift_SN) * scale_SN).sum(0) / sum_N
        correct_N = target_logit_N >= top_N
        ctx.save_for_backward(x_ND, weight_VD, target_N, lse_N, entropy_N)
        ctx.mark_non_differentiable(correct_N)
        ctx.set_materialize_grads(False)
        return lse_N - target_logit_N, correct_N, entropy_N

    @staticmethod
    def backward(ctx, loss_grad_N: Tensor | None, _, entropy_grad_N: Tensor | None):
        x_ND, weight_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        (N, D), V, tile = x_ND.shape, len(weight_VD), _tile(x_ND)
        loss_grad_N = torch.zeros_like(lse_N) if loss_grad_N is None else loss_grad_N.contiguous()
        wants_entropy = entropy_grad_N is not None
        # The kernel does not read what it is given in the place of an entropy that nobody wants.
        entropies = (lse_N, lse_N) if entropy_grad_N is None else (entropy_N, entropy_grad_N.contiguous())
        need_x, need_weight, *_ = ctx.needs_input_grad
        grad_x_ND = torch.zeros_like(x_ND, dtype=torch.float32) if need_x else None
        grad_weight_VD = torch.zeros_like(weight_VD) if need_weight else None
        part = max(tile.ids, PART_ELEMENTS // max(1, N) // tile.ids * tile.ids)
        with torch.autocast(x_ND.device.type, enabled=False), torch.cuda.device_of(x_ND):
            for start in range(0, V if N else 0, part):
                stop = min(start + part, V)
                slope_NP = x_ND.new_empty(N, stop - start)
                tensors = (x_ND, weight_VD, target_N, lse_N, loss_grad_N, *entropies, slope_NP)
                grid = (triton.cdiv(N, tile.tokens), triton.cdiv(stop - start, tile.ids))
                _slope_kernel[grid](*tensors, N, D, start, stop, ENTROPY=wants_entropy, **_options(x_ND, tile))
                if grad_x_ND is not None:
                    grad_x_ND += slope_NP @ weight_VD[start:stop].to(x_ND.dtype)
                if grad_weight_VD is not None:
                    grad_weight_VD[start:stop] = slope_NP.t() @ x_ND
        return None if grad_x_ND is None else grad_x_ND.to(x_ND.dtype), grad_weight_VD, None, None


@triton.jit
def _logits(x_ptr, weight_ptr, n, v, N, V, D, DOT: tl.constexpr, PRECISION: tl.constexpr, CHANNELS: tl.constexpr):
    """x[n] . W[v] in float32, for a tile of tokens n and ids v; any number where n or v lies outside."""
    logits = tl.zeros((n.shape[0], v.shape[0]), dtype=tl.float32)
    d = tl.arange(0, CHANNELS)
    # 64 bits: a head of 400k ids and 8k channels has more elements than 32 bits count.
    x_row, weight_row = n.to(tl.int64)[:, None] * D, v.to(tl.int64)[None, :] * D
    for start in range(0, D, CHANNELS):
        channel = start + d
        x = tl.load(x_ptr + x_row + channel[None, :], mask=(n < N)[:, None] & (channel < D)[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + weight_row + channel[:, None], mask=(v < V)[None, :] & (channel < D)[:, None], other=0.0
        )
        logits = tl.dot(x.to(DOT), weight.to(x.dtype).to(DOT), logits, input_precision=PRECISION)
    return logits


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    target_ptr,
    top_ptr,
    sum_ptr,
    moment_ptr,
    target_logit_ptr,
    N,
    V,
    D,
    share,
    ENTROPY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    IDS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = n < N
    target = tl.load(target_ptr + n, mask=inside, other=-1)
    first = tl.program_id(1) * share
    top = tl.full((TOKENS,), -1e30, dtype=tl.float32)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    moment = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + share, V), IDS):
        v = start + tl.arange(0, IDS)
        logits = _logits(x_ptr, weight_ptr, n, v, N, V, D, DOT, PRECISION, CHANNELS)
        logits = tl.where((v < V)[None, :], logits, -1e30)
        is_target = v[None, :] == target[:, None]
        holds = (target >= start) & (target < start + IDS)
        target_logit = tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        tl.store(target_logit_ptr + n, target_logit, mask=inside & holds)
        above = tl.maximum(top, tl.max(logits, axis=1))
        shift = top - above
        logits = logits - above[:, None]
        exp = tl.exp(logits)
        if ENTROPY:
            moment = (moment + total * shift) * tl.exp(shift) + tl.sum(exp * logits, axis=1)
        total = total * tl.exp(shift) + tl.sum(exp, axis=1)
        top = above
    row = tl.program_id(1).to(tl.int64) * N + n
    tl.store(top_ptr + row, top, mask=inside)
    tl.store(sum_ptr + row, total, mask=inside)
    tl.store(moment_ptr + row, moment, mask=inside)


@triton.jit
def _slope_kernel(
    x_ptr,
    weight_ptr,
    target_ptr,
    lse_ptr,
    loss_grad_ptr,
    entropy_ptr,
    entropy_grad_ptr,
    slope_ptr,
    N,
    D,
    first,
    stop,
    ENTROPY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    IDS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    v = first + tl.program_id(1) * IDS + tl.arange(0, IDS)
    inside = n < N
    logits = _logits(x_ptr, weight_ptr, n, v, N, stop, D, DOT, PRECISION, CHANNELS)
    log_prob = logits - tl.load(lse_ptr + n, mask=inside, other=0.0)[:, None]
    loss_grad = tl.load(loss_grad_ptr + n, mask=inside, other=0.0)[:, None]
    factor = loss_grad
    if ENTROPY:
        entropy = tl.load(entropy_ptr + n, mask=inside, other=0.0)[:, None]
        entropy_grad = tl.load(entropy_grad_ptr + n, mask=inside, other=0.0)[:, None]
        factor = loss_grad - entropy_grad * (log_prob + entropy)
    target = tl.load(target_ptr + n, mask=inside, other=-1)
    slope = tl.exp(log_prob) * factor - tl.where(v[None, :] == target[:, None], loss_grad, 0.0)
    offset = n.to(tl.int64)[:, None] * (stop - first) + (v - first)[None, :]
    mask = inside[:, None] & (v < stop)[None, :]
    tl.store(slope_ptr + offset, slope.to(slope_ptr.dtype.element_ty), mask=mask)


def _tile(x_ND: Tensor) -> Tile:
    if x_ND.device.type != "cuda":
        return Tile(16, 32, 16)  # the interpreter: small shapes, so that tests cross the edges of tiles
    return Tile(128, 128, 64) if x_ND.element_size() == 2 else Tile(64, 64, 32)


def _shares(N: int, V: int, tile: Tile, device: torch.device) -> int:
    """Enough programs to fill the device: tiles of tokens alone are few."""
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    wanted = triton.cdiv(programs, max(1, triton.cdiv(N, tile.tokens)))
    tiles = triton.cdiv(V, tile.ids)
    # No share may be empty.
    return triton.cdiv(tiles, triton.cdiv(tiles, min(wanted, tiles)))


def _options(x_ND: Tensor, tile: Tile) -> dict[str, Any]:
    """What both kernels are compiled for."""
    # The interpreter's product would take the bits of bfloat16 for whole numbers.
    dtypes = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16} if x_ND.device.type == "cuda" else {}
    return {
        "DOT": dtypes.get(x_ND.dtype, tl.float32),
        # tf32 where the user allows it for plain matrix products
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "TOKENS": tile.tokens,
        "IDS": tile.ids,
        "CHANNELS": tile.channels,
        "num_warps": 8,
        "num_stages": 3,
    }
