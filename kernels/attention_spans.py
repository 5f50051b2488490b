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
from typing import NamedTuple

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
        q, k, v = _Positions.of(q_BHLD, k_BGLD), _Positions.of(k_BGLD, k_BGLD), _Positions.of(v_BGLD, k_BGLD)
        y = q.empty()
        for piece in _pieces(visibility, q_BHLD):
            weight_SMK = _weights(piece.queries(q) * q.scale, piece.keys(k), piece.bias)
            piece.put_queries(y, torch.bmm(weight_SMK, piece.keys(v)))
        return y.as_heads()

    @staticmethod
    def backward(ctx, grad_BHLD: Tensor):
        q_BHLD, k_BGLD, v_BGLD = ctx.saved_tensors
        q, k, v, grad = (_Positions.of(x, k_BGLD) for x in (q_BHLD, k_BGLD, v_BGLD, grad_BHLD))
        # Sums over the spans of a document, hence float32.
        dq, dk, dv = q.empty(), k.zeros(torch.float32), v.zeros(torch.float32)
        for piece in _pieces(ctx.visibility, q_BHLD):
            q_SMD, k_SKD, grad_SMD = piece.queries(q) * q.scale, piece.keys(k), piece.gradients(grad)
            weight_SMK = _weights(q_SMD, k_SKD, piece.bias)
            piece.add_keys(dv, torch.bmm(weight_SMK.mT, grad_SMD))
            slope_SMK = torch.bmm(grad_SMD, piece.keys(v).mT)
            slope_SMK = torch._softmax_backward_data(slope_SMK, weight_SMK, -1, weight_SMK.dtype)
            piece.add_keys(dk, torch.bmm(slope_SMK.mT, q_SMD))
            piece.put_queries(dq, torch.bmm(slope_SMK, k_SKD).mul_(q.scale))
        return dq.as_heads(), dk.as_heads().to(k_BGLD.dtype), dv.as_heads().to(v_BGLD.dtype), None


class _Positions(NamedTuple):
    """One of q, k, v and their gradients by position, the query heads of a group next to each other."""

    x_BLGRD: Tensor
    """[B, L, G, R, D], R = 1 for keys and values."""

    @classmethod
    def of(cls, x_BHLD: Tensor, k_BGLD: Tensor) -> _Positions:
        B, H, L, D = x_BHLD.shape
        G = k_BGLD.shape[1]
        return cls(x_BHLD.transpose(1, 2).contiguous().view(B, L, G, H // G, D))

    def empty(self) -> _Positions:
        return _Positions(torch.empty_like(self.x_BLGRD))

    def zeros(self, dtype: torch.dtype) -> _Positions:
        return _Positions(torch.zeros_like(self.x_BLGRD, dtype=dtype))

    @property
    def scale(self) -> float:
        return self.x_BLGRD.shape[-1] ** -0.5

    @property
    def all_AGRD(self) -> Tensor:
        """Positions of all rows behind each other."""
        return self.x_BLGRD.flatten(0, 1)

    def as_heads(self) -> Tensor:
        """[B, H, L, D], a view."""
        return self.x_BLGRD.flatten(2, 3).transpose(1, 2)


class _SpanPiece(NamedTuple):
    """Some queries of a span."""

    row: int
    queries_: slice
    keys_: slice
    bias: Tensor | None
    """[n, hidden]: over the last keys; the same for all heads."""

    def queries(self, x: _Positions) -> Tensor:
        x_nGRD = x.x_BLGRD[self.row, self.queries_]
        return x_nGRD.permute(1, 2, 0, 3).flatten(1, 2)

    gradients = queries

    def keys(self, x: _Positions) -> Tensor:
        return x.x_BLGRD[self.row, self.keys_, :, 0].transpose(0, 1)

    def put_queries(self, out: _Positions, value_SMD: Tensor) -> None:
        out_GRnD = out.x_BLGRD[self.row, self.queries_].permute(1, 2, 0, 3)
        out_GRnD.copy_(value_SMD.view(out_GRnD.shape))

    def add_keys(self, out: _Positions, value_SKD: Tensor) -> None:
        out.x_BLGRD[self.row, self.keys_, :, 0] += value_SKD.transpose(0, 1)


class _StackPiece(NamedTuple):
    """The documents of a stack."""

    stack: Stack

    @property
    def bias(self) -> Tensor:
        return self.stack.bias_n1mm

    def queries(self, x: _Positions) -> Tensor:
        return self._stacked(x.all_AGRD.index_select(0, self.stack.position_nm.flatten()))

    keys = queries

    def gradients(self, x: _Positions) -> Tensor:
        x_PGRD = x.all_AGRD.index_select(0, self.stack.position_nm.flatten())
        x_PGRD[self.stack.behind_P] = 0
        return self._stacked(x_PGRD)

    def put_queries(self, out: _Positions, value_SMD: Tensor) -> None:
        (n, m), out_AGRD, real_P = self.stack.position_nm.shape, out.all_AGRD, self.stack.real_P
        _, G, R, D = out_AGRD.shape
        value_PGRD = value_SMD.view(n, G, R, m, D).permute(0, 3, 1, 2, 4).reshape(n * m, G, R, D)
        if len(self.stack.behind_P):
            value_PGRD = value_PGRD[real_P]
        out_AGRD.index_copy_(0, self.stack.position_nm.flatten()[real_P], value_PGRD.to(out_AGRD.dtype))

    add_keys = put_queries  # all of a document's queries are here, so nothing else adds to its keys

    def _stacked(self, x_PGRD: Tensor) -> Tensor:
        (n, m), (_, G, R, D) = self.stack.position_nm.shape, x_PGRD.shape
        return x_PGRD.view(n, m, G, R, D).permute(0, 2, 3, 1, 4).reshape(n * G, R * m, D)


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
    for span in visibility.spans():
        first, stop = span.queries.start, span.queries.stop
        size = max(16, PIECE_ELEMENTS // (H * (span.keys.stop - span.keys.start)))
        for start in range(first, stop, size):
            end = min(start + size, stop)
            bias = None if span.bias_QQ is None else span.bias_QQ[start - first : end - first].to(dtype)
            yield _SpanPiece(span.row, slice(start, end), span.keys, bias)
