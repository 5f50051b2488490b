"""The one visibility law of text, images and packs (paper section 2.2, design of VAR), in the forms that kernels want.

    query q sees key k   iff   document[q] == document[k]  and  block[k] <= block[q]

A text token is a block of its own and a scale of an image is one block, so text is causal and a scale sees itself, all
coarser scales and everything before the image. Padding is document -1 and sees only padding.

Shapes: B batch, L positions; of a stack: n documents of up to m positions, P = n m places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WHOLE_BLOCK = 128
"""A block of this many positions is a span of its own; smaller ones (text, coarse scales) share one."""
SHARED_SPAN = 256
"""Most positions of a span that several blocks share."""
STACKED_DOCUMENT = {torch.float32: 128, torch.bfloat16: 320, torch.float16: 320}
"""A document of at most this many positions is stacked with others: what its mask hides costs less than calls for its spans.
Other precisions stack none."""
STACKED_FROM = 0.75
"""The shortest document of a stack has this share of the positions of its longest."""


class Span(NamedTuple):
    """Queries of one row that see (almost) the same keys: all of `keys`, but for what `bias` hides."""

    row: int
    queries: slice
    keys: slice
    """From the first position of the document."""
    bias_QQ: Tensor | None
    """float32, 0 or -inf, over the last keys, which are the queries themselves; None when all keys are seen."""

    @property
    def pairs(self) -> int:
        """Scores per head."""
        return (self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start)


class Stack(NamedTuple):
    """Short documents of about one length, whole, one behind the other along a new axis."""

    position_nm: Tensor
    """int64, b * L + l of each place; places behind the end of a shorter document name its first position."""
    bias_n1mm: Tensor
    """0, or -inf for keys that a query does not see. Places behind an end are hidden and see the document's first position."""
    row_P: Tensor
    """int64, the row of each place that is a position."""
    column_P: Tensor
    """int64, and where it is in its row."""
    real_P: Tensor
    """int64, the places that are positions."""
    behind_P: Tensor
    """int64, the places behind an end."""

    @property
    def pairs(self) -> int:
        """Scores per head."""
        return self.bias_n1mm.numel()


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom in a packed batch. Masks, tiles, spans and stacks are built on first use and shared by all layers.

    Args:
        document_BL: int64, number of the document of each position, -1 for padding.
        block_BL: int64, running number of the block of each position.
    """

    document_BL: Tensor
    block_BL: Tensor
    _built: dict = field(default_factory=dict, repr=False)

    def mask_BLL(self) -> Tensor:
        """The law itself: bool [B, query, key]."""
        same_BLL = self.document_BL[:, :, None] == self.document_BL[:, None, :]
        return same_BLL & (self.block_BL[:, None, :] <= self.block_BL[:, :, None])

    def bias_B1LL(self, dtype: torch.dtype) -> Tensor:
        """0 where visible and -inf elsewhere; SDPA would otherwise convert a bool mask again in every layer."""
        if dtype not in self._built:
            self._built[dtype] = hidden_bias(self.mask_BLL()[:, None], dtype)
        return self._built[dtype]

    def block_mask(self):
        """The law as FlexAttention's BlockMask."""
        if "flex" not in self._built:
            from nextflow.kernels.attention_flex import block_mask

            self._built["flex"] = block_mask(self.document_BL, self.block_BL)
        return self._built["flex"]

    def spans(self, dtype: torch.dtype) -> tuple[Span, ...]:
        """The law of long documents as spans of queries, each with a run of keys that it sees whole.

        Args:
            dtype: decides with `STACKED_DOCUMENT` which documents are long.

        Raises:
            ValueError: a document is not in one piece, or its blocks are not in order (`lay_out` always makes them so).
        """
        key = "spans", dtype
        if key not in self._built:
            long = [document for document in self._documents() if document.length > STACKED_DOCUMENT.get(dtype, 0)]
            self._built[key] = tuple(span for document in long for span in _spans(document))
        return self._built[key]

    def stacks(self, most_pairs: int, dtype: torch.dtype) -> tuple[Stack, ...]:
        """The law of short documents as stacks.

        Args:
            most_pairs: scores per head of a stack of several documents.
            dtype: decides with `STACKED_DOCUMENT` which documents are short; also of the biases.

        Raises:
            ValueError: as `spans`.
        """
        key = "stacks", most_pairs, dtype
        if key not in self._built:
            short = [document for document in self._documents() if document.length <= STACKED_DOCUMENT.get(dtype, 0)]
            self._built[key] = tuple(_stacks(short, most_pairs, dtype))
        return self._built[key]

    def _documents(self) -> list[_Document]:
        if "documents" not in self._built:
            rows = enumerate(zip(self.document_BL.cpu().numpy(), self.block_BL.cpu().numpy()))
            self._built["documents"] = [document for row, pieces in rows for document in _documents(row, *pieces)]
        return self._built["documents"]

    def is_ordered(self) -> bool:
        """Whether every document is in one piece with its blocks in order, so that spans and stacks exist."""
        if "ordered" not in self._built:
            rows = zip(self.document_BL.cpu().numpy(), self.block_BL.cpu().numpy())
            self._built["ordered"] = all(_is_ordered(*row) for row in rows)
        return self._built["ordered"]

    def is_causal(self) -> bool:
        """Whether every position sees exactly itself and all before it: one text per row, no padding."""
        if "causal" not in self._built:
            one = (self.document_BL == self.document_BL[:, :1]).all()
            self._built["causal"] = bool(one & (self.block_BL.diff(dim=1) > 0).all())
        return self._built["causal"]


def hidden_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True and -inf elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _is_ordered(document_L: np.ndarray, block_L: np.ndarray) -> bool:
    new_document = np.diff(document_L) != 0
    pieces = 1 + int(new_document.sum())
    return pieces == len(np.unique(document_L)) and bool((new_document | (np.diff(block_L) >= 0)).all())


class _Document(NamedTuple):
    """A document of a pack; the padding of a row is one."""

    row: int
    start: int
    block_l: np.ndarray
    row_length: int

    @property
    def length(self) -> int:
        return len(self.block_l)


def _documents(row: int, document_L: np.ndarray, block_L: np.ndarray) -> list[_Document]:
    if not _is_ordered(document_L, block_L):
        raise ValueError(
            "attention: 'spans' needs each document in one piece and its blocks in order; use 'auto' or 'sdpa'"
        )
    starts = [0, *(np.flatnonzero(np.diff(document_L)) + 1).tolist()]
    ends = [*starts[1:], len(document_L)]
    return [_Document(row, start, block_L[start:end], len(document_L)) for start, end in zip(starts, ends)]


def _spans(document: _Document) -> list[Span]:
    spans, length = [], document.length
    starts = [0, *(np.flatnonzero(np.diff(document.block_l)) + 1).tolist()]
    first = 0  # start of the shared span that is being gathered
    for start, stop in zip(starts, [*starts[1:], length]):
        if stop - start >= WHOLE_BLOCK:
            if first < start:
                spans.append(_span(document, first, start))
            spans.append(_span(document, start, stop))
            first = stop
        elif stop - first >= SHARED_SPAN or stop == length:
            spans.append(_span(document, first, stop))
            first = stop
    return spans


def _span(document: _Document, start: int, stop: int) -> Span:
    block_Q = torch.from_numpy(document.block_l[start:stop])
    seen_QQ = block_Q[None, :] <= block_Q[:, None]
    bias_QQ = None if bool(seen_QQ.all()) else hidden_bias(seen_QQ, torch.float32)
    begin = document.start
    return Span(document.row, slice(begin + start, begin + stop), slice(begin, begin + stop), bias_QQ)


def _stacks(documents: list[_Document], most_pairs: int, dtype: torch.dtype) -> Iterator[Stack]:
    left = sorted(documents, key=lambda document: -document.length)
    while left:
        longest = left[0].length
        alike = sum(document.length >= STACKED_FROM * longest for document in left)
        count = max(1, min(alike, most_pairs // longest**2))
        yield _stack(left[:count], dtype)
        left = left[count:]


def _stack(documents: list[_Document], dtype: torch.dtype) -> Stack:
    place_m = np.arange(documents[0].length)
    real_nm = place_m < np.array([document.length for document in documents])[:, None]
    # A block above all others hides a place behind the end from every position.
    block_nm = np.full(real_nm.shape, np.iinfo(np.int64).max)
    block_nm[real_nm] = np.concatenate([document.block_l for document in documents])
    seen_nmm = (block_nm[:, None, :] <= block_nm[:, :, None]) & real_nm[:, :, None]
    seen_nmm |= (~real_nm)[:, :, None] & (place_m == 0)
    row_nm, column_nm = (
        np.array([(document.row, document.start) for document in documents])[:, field, None] + np.zeros_like(block_nm)
        for field in (0, 1)
    )
    column_nm = column_nm + np.where(real_nm, place_m, 0)
    return Stack(
        position_nm=torch.from_numpy(row_nm * documents[0].row_length + column_nm),
        row_P=torch.from_numpy(row_nm[real_nm]),
        column_P=torch.from_numpy(column_nm[real_nm]),
        bias_n1mm=hidden_bias(torch.from_numpy(seen_nmm)[:, None], dtype),
        real_P=torch.from_numpy(np.flatnonzero(real_nm)),
        behind_P=torch.from_numpy(np.flatnonzero(~real_nm)),
    )
