"""Attention on a CPU that spends no work on what is hidden: a packed batch as spans of queries with their visible keys.

A scale of an image sees a run of keys from the start of its document to its own end, all of it: two matrix products and
a softmax without a mask. Text and coarse scales share spans, in which only a small square next to the diagonal has a mask.
Documents of a pack never meet. A span is worked off in pieces whose scores stay near the cache; the backward pass makes them
again, so that between the passes nothing but q, k and v is kept.

    P = softmax(c q k^T),  y = P v,  c = 1 / sqrt(D)
    dv = P^T dy,  dS = P (dy v^T - rowsum(P dy v^T)),  dq = c dS k,  dk = c dS^T q

Shapes: B batch, H query heads in G groups of R, G key/value heads, L positions, D head width; of a piece: M = R n queries
of n positions, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nextflow.kernels.visibility import Span, Visibility

PIECE_ELEMENTS = 2**20
"""Scores of a piece."""


# Its loop depends on the batch and not on the graph.
@torch.compiler.disable
def attention_spans(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, visibility: Visibility) -> Tensor:
    """Attention of a packed batch [B, H, L, D]."""
    return _SpanAttention.apply(q_BHLD, k_BGLD, v_BGLD, visibility)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, visibility: Visibility):
        ctx.save_for_backward(q_BHLD, k_BGLD, v_BGLD)
        ctx.visibility = visibility
        rows = _Rows(q_BHLD, k_BGLD)
        k_BGLD, v_BGLD = k_BGLD.contiguous(), v_BGLD.contiguous()
        y_BHLD = torch.empty_like(q_BHLD, memory_format=torch.contiguous_format)
        for span, queries, bias in _pieces(visibility.spans(), q_BHLD):
            k_GKD, v_GKD = k_BGLD[span.row, :, span.keys], v_BGLD[span.row, :, span.keys]
            weight_GMK = _weights(rows.take(q_BHLD, span.row, queries, rows.scale), k_GKD, bias)
            rows.put(y_BHLD, span.row, queries, torch.bmm(weight_GMK, v_GKD))
        return y_BHLD

    @staticmethod
    def backward(ctx, grad_BHLD: Tensor):
        q_BHLD, k_BGLD, v_BGLD = ctx.saved_tensors
        rows = _Rows(q_BHLD, k_BGLD)
        k_BGLD, v_BGLD = k_BGLD.contiguous(), v_BGLD.contiguous()
        dq_BHLD = torch.empty_like(q_BHLD, memory_format=torch.contiguous_format)
        # Sums over many pieces, hence float32.
        dk_BGLD, dv_BGLD = (torch.zeros_like(x, dtype=torch.float32) for x in (k_BGLD, v_BGLD))
        for span, queries, bias in _pieces(ctx.visibility.spans(), q_BHLD):
            k_GKD, v_GKD = k_BGLD[span.row, :, span.keys], v_BGLD[span.row, :, span.keys]
            q_GMD = rows.take(q_BHLD, span.row, queries, rows.scale)
            grad_GMD = rows.take(grad_BHLD, span.row, queries)
            weight_GMK = _weights(q_GMD, k_GKD, bias)
            dv_BGLD[span.row, :, span.keys] += torch.bmm(weight_GMK.mT, grad_GMD)
            slope_GMK = torch._softmax_backward_data(torch.bmm(grad_GMD, v_GKD.mT), weight_GMK, -1, weight_GMK.dtype)
            dk_BGLD[span.row, :, span.keys] += torch.bmm(slope_GMK.mT, q_GMD)
            rows.put(dq_BHLD, span.row, queries, torch.bmm(slope_GMK, k_GKD).mul_(rows.scale))
        return dq_BHLD, dk_BGLD.to(k_BGLD.dtype), dv_BGLD.to(v_BGLD.dtype), None


class _Rows:
    """Takes and puts queries of a span: the query heads of a group stand behind each other, so keys need no copies."""

    def __init__(self, q_BHLD: Tensor, k_BGLD: Tensor) -> None:
        self.G, self.R, self.D = k_BGLD.shape[1], q_BHLD.shape[1] // k_BGLD.shape[1], q_BHLD.shape[-1]
        self.scale = self.D**-0.5

    def take(self, x_BHLD: Tensor, row: int, queries: slice, scale: float = 1.0) -> Tensor:
        x_HnD = x_BHLD[row, :, queries]
        return (x_HnD * scale if scale != 1.0 else x_HnD).reshape(self.G, -1, self.D)

    def put(self, x_BHLD: Tensor, row: int, queries: slice, value_GMD: Tensor) -> None:
        x_BHLD[row, :, queries] = value_GMD.view(self.G * self.R, -1, self.D)


def _weights(q_GMD: Tensor, k_GKD: Tensor, bias: Tensor | None) -> Tensor:
    score_GMK = torch.bmm(q_GMD, k_GKD.mT)
    if bias is not None:
        n, hidden = bias.shape
        G, M, K = score_GMK.shape
        score_GMK.view(G, M // n, n, K)[..., K - hidden :] += bias
    return score_GMK.softmax(-1)


def _pieces(spans: tuple[Span, ...], q_BHLD: Tensor) -> Iterator[tuple[Span, slice, Tensor | None]]:
    """Spans cut so that a piece has about PIECE_ELEMENTS scores: (span, its queries, their rows of the bias)."""
    H = q_BHLD.shape[1]
    for span in spans:
        first, stop = span.queries.start, span.queries.stop
        size = max(16, PIECE_ELEMENTS // (H * (span.keys.stop - span.keys.start)))
        for start in range(first, stop, size):
            end = min(start + size, stop)
            bias = None if span.bias_QQ is None else span.bias_QQ[start - first : end - first].to(q_BHLD.dtype)
            yield span, slice(start, end), bias
