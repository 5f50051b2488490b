"""Attention on a CPU that spends little work on what is hidden: a pack as stacks of short documents and spans of long ones.

Documents of a pack never meet. Short ones of about one length are stacked along a new axis: two batched products and a
softmax for all of them, under a mask. A long one comes as spans of queries with their visible keys: a scale of an image sees a
run of keys from the start of its document to its own end, all of it, without a mask; text and coarse scales share spans, in
which only a small square next to the diagonal has one. Stacks and spans are worked off in pieces whose scores stay near the
cache; the backward pass makes them again, so that between the passes nothing but q, k and v is kept.

    P = softmax(c q k^T),  y = P v,  c = 1 / sqrt(D)
    dv = P^T dy,  dS = P (dy v^T - rowsum(P dy v^T)),  dq = c dS k,  dk = c dS^T q

Shapes: B batch, H query heads in G groups of R, G key/value heads, L positions, D head width, A = B L positions of all rows;
of a piece: S sets of queries and keys that meet (groups; groups of each document), M = R n queries of n positions, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nextflow.kernels.visibility import Stack, Visibility

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
        G, c = k_BGLD.shape[1], q_BHLD.shape[-1] ** -0.5
        q, k, v = (_Packed(x, G) for x in (q_BHLD, k_BGLD, v_BGLD))
        y = q.new()
        for piece in _pieces(visibility, q_BHLD):
            weight_SMK = _weights(piece.queries(q) * c, piece.keys(k), piece.bias)
            piece.put_queries(y, torch.bmm(weight_SMK, piece.keys(v)))
        return y.x_BHLD

    @staticmethod
    def backward(ctx, grad_BHLD: Tensor):
        q_BHLD, k_BGLD, v_BGLD = ctx.saved_tensors
        G, c = k_BGLD.shape[1], q_BHLD.shape[-1] ** -0.5
        q, k, v, grad = (_Packed(x, G) for x in (q_BHLD, k_BGLD, v_BGLD, grad_BHLD))
        # Sums over the spans of a document, hence float32.
        dq = q.new()
        dk, dv = (_Packed(torch.zeros(x.shape, dtype=torch.float32), G) for x in (k_BGLD, v_BGLD))
        for piece in _pieces(ctx.visibility, q_BHLD):
            q_SMD, k_SKD, grad_SMD = piece.queries(q) * c, piece.keys(k), piece.gradients(grad)
            weight_SMK = _weights(q_SMD, k_SKD, piece.bias)
            piece.add_keys(dv, torch.bmm(weight_SMK.mT, grad_SMD))
            slope_SMK = torch.bmm(grad_SMD, piece.keys(v).mT)
            slope_SMK = torch._softmax_backward_data(slope_SMK, weight_SMK, -1, weight_SMK.dtype)
            piece.add_keys(dk, torch.bmm(slope_SMK.mT, q_SMD))
            piece.put_queries(dq, torch.bmm(slope_SMK, k_SKD).mul_(c))
        return dq.x_BHLD, dk.x_BHLD.to(k_BGLD.dtype), dv.x_BHLD.to(v_BGLD.dtype), None


@dataclass(frozen=True)
class _Packed:
    """One of q, k, v and their gradients, of any strides."""

    x_BHLD: Tensor
    G: int

    def new(self) -> _Packed:
        """Of the same shape, the heads of a position next to each other, as the output projection wants them."""
        return _Packed(torch.empty_like(self.x_BHLD.transpose(1, 2).contiguous()).transpose(1, 2), self.G)

    @cached_property
    def by_head_BHLD(self) -> Tensor:
        """The positions of a head next to each other."""
        return self.x_BHLD.contiguous()

    @cached_property
    def by_position_AHD(self) -> Tensor:
        """The heads of a position next to each other, positions of all rows in one axis."""
        return self.x_BHLD.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class _SpanPiece:
    """Some queries of a span: the query heads of a group stand behind each other, so keys need no copies."""

    row: int
    at: slice
    """The queries."""
    seen: slice
    """The keys."""
    bias: Tensor | None
    """[n, hidden]: over the last keys; the same for all heads."""

    def queries(self, x: _Packed) -> Tensor:
        return x.x_BHLD[self.row, :, self.at].reshape(x.G, -1, x.x_BHLD.shape[-1])

    gradients = queries

    def keys(self, x: _Packed) -> Tensor:
        return x.by_head_BHLD[self.row, :, self.seen]

    def put_queries(self, out: _Packed, value_SMD: Tensor) -> None:
        out_HnD = out.x_BHLD[self.row, :, self.at]
        out_HnD.copy_(value_SMD.view(out_HnD.shape))

    def add_keys(self, out: _Packed, value_SKD: Tensor) -> None:
        out.x_BHLD[self.row, :, self.seen] += value_SKD


@dataclass(frozen=True)
class _StackPiece:
    """The documents of a stack."""

    stack: Stack

    @property
    def bias(self) -> Tensor:
        return self.stack.bias_n1mm

    def queries(self, x: _Packed) -> Tensor:
        return self._stacked(x, x.by_position_AHD.index_select(0, self.stack.position_nm.flatten()))

    keys = queries

    def gradients(self, x: _Packed) -> Tensor:
        x_PHD = x.by_position_AHD.index_select(0, self.stack.position_nm.flatten())
        x_PHD[self.stack.behind_P] = 0
        return self._stacked(x, x_PHD)

    def put_queries(self, out: _Packed, value_SMD: Tensor) -> None:
        n, m = self.stack.position_nm.shape
        _, H, _, D = out.x_BHLD.shape
        value_PHD = value_SMD.view(n, H, m, D).transpose(1, 2).reshape(n * m, H, D)
        if len(self.stack.behind_P):
            value_PHD = value_PHD[self.stack.real_P]
        out.x_BHLD.transpose(1, 2)[self.stack.row_P, self.stack.column_P] = value_PHD.to(out.x_BHLD.dtype)

    add_keys = put_queries  # all of a document's queries are here, so nothing else adds to its keys

    def _stacked(self, x: _Packed, x_PHD: Tensor) -> Tensor:
        (n, m), (_, H, D) = self.stack.position_nm.shape, x_PHD.shape
        return x_PHD.view(n, m, H, D).transpose(1, 2).reshape(n * x.G, H // x.G * m, D)


def most_stacked_pairs(num_heads: int) -> int:
    """Scores per head of a stack, so that it has about PIECE_ELEMENTS scores."""
    return PIECE_ELEMENTS // num_heads


def _weights(q_SMD: Tensor, k_SKD: Tensor, bias: Tensor | None) -> Tensor:
    score_SMK = torch.bmm(q_SMD, k_SKD.mT)
    if bias is not None:
        n, hidden = bias.shape[-2:]
        sets = len(bias) if bias.dim() == 4 else 1
        score_SMK.view(sets, -1, n, score_SMK.shape[-1])[..., -hidden:] += bias
    return score_SMK.softmax(-1)


def _pieces(visibility: Visibility, q_BHLD: Tensor) -> Iterator[_SpanPiece | _StackPiece]:
    """Stacks, and spans cut so that a piece has about PIECE_ELEMENTS scores."""
    H, dtype = q_BHLD.shape[1], q_BHLD.dtype
    yield from map(_StackPiece, visibility.stacks(most_stacked_pairs(H), dtype))
    for span in visibility.spans(dtype):
        first, stop = span.queries.start, span.queries.stop
        size = max(16, PIECE_ELEMENTS // (H * (span.keys.stop - span.keys.start)))
        for start in range(first, stop, size):
            end = min(start + size, stop)
            bias = None if span.bias_QQ is None else span.bias_QQ[start - first : end - first].to(dtype)
            yield _SpanPiece(span.row, slice(start, end), span.keys, bias)
