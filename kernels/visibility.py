"""The one visibility law of text, images and packs (paper section 2.2, design of VAR), in the forms that kernels want.

    query q sees key k   iff   document[q] == document[k]  and  block[k] <= block[q]

A text token is a block of its own and a scale of an image is one block, so text is causal and a scale sees itself, all
coarser scales and everything before the image. Padding is document -1 and sees only padding.

Shapes: B batch, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WHOLE_BLOCK = 64
"""A block of this many positions is a span of its own; smaller ones (text, coarse scales) share one."""
SHARED_SPAN = 128
"""Most positions of a span that several blocks share."""


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


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom in a packed batch. Masks, tiles and spans are built on first use and shared by all layers.

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

    def spans(self) -> tuple[Span, ...]:
        """The law as spans of queries, each with a run of keys that it sees whole.

        Raises:
            ValueError: a document is not in one piece, or its blocks are not in order (`lay_out` always makes them so).
        """
        if "spans" not in self._built:
            document_BL, block_BL = self.document_BL.cpu().numpy(), self.block_BL.cpu().numpy()
            rows = range(len(document_BL))
            self._built["spans"] = tuple(span for row in rows for span in _spans(row, document_BL[row], block_BL[row]))
        return self._built["spans"]

    def is_ordered(self) -> bool:
        """Whether every document is in one piece with its blocks in order, so that `spans` exist."""
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


def _spans(row: int, document_L: np.ndarray, block_L: np.ndarray) -> list[Span]:
    if not _is_ordered(document_L, block_L):
        raise ValueError(
            "attention: 'spans' needs each document in one piece and its blocks in order; use 'auto' or 'sdpa'"
        )
    spans: list[Span] = []
    L = len(document_L)
    new_document = np.diff(document_L) != 0
    # Starts of the runs of equal document and block, and for each run the start of its document.
    starts = np.flatnonzero(np.concatenate(([True], new_document | (np.diff(block_L) != 0))))
    documents = np.maximum.accumulate(np.where(np.concatenate(([True], new_document)), np.arange(L), 0))[starts]
    stops = np.append(starts[1:], L)
    first = 0  # start of the shared span that is being gathered
    for start, stop, document, following in zip(starts, stops, documents, np.append(documents[1:], -1)):
        whole = stop - start >= WHOLE_BLOCK
        if whole:
            if first < start:
                spans.append(_shared(row, first, int(start), document, block_L))
            spans.append(Span(row, slice(start, stop), slice(document, stop), None))
            first = stop
        elif stop - first >= SHARED_SPAN or following != document:
            spans.append(_shared(row, first, int(stop), document, block_L))
            first = stop
    return spans


def _shared(row: int, start: int, stop: int, document: int, block_L: np.ndarray) -> Span:
    block_Q = torch.from_numpy(block_L[start:stop])
    seen_QQ = block_Q[None, :] <= block_Q[:, None]
    bias_QQ = None if bool(seen_QQ.all()) else hidden_bias(seen_QQ, torch.float32)
    return Span(row, slice(start, stop), slice(document, stop), bias_QQ)
