"""Which documents share a row: strategies as functions from lengths to rows of indices.

A strategy sees lengths alone, so that it can be tested and compared without building a single sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nextflow.sequence.documents import Document, TextSegment
from nextflow.sequence.scales import num_codes_of

Packing = Literal["padded", "fixed_length"]


def document_length(document: Document, *, feed_last_scale: bool = False) -> int:
    """Number of positions of a document: `<start>`, its text ids; per image `<boi>`, its blocks and `<eoi>`."""
    length = 1
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            length += len(segment.ids)
        else:
            # <boi> predicts the one code of scale 1, so `<boi>` and blocks take as many positions as there are codes.
            height, width = segment.grids[-1]
            length += num_codes_of(segment.grids) + 1 + (height * width if feed_last_scale else 0)
    return length


def pack_padded(lengths: Sequence[int]) -> list[list[int]]:
    """One document per row: pack_padded([5, 3]) is [[0], [1]]."""
    return [[index] for index in range(len(lengths))]


def pack_fixed_length(lengths: Sequence[int], length: int) -> list[list[int]]:
    """First fit into rows of `length` positions, in order: pack_fixed_length([5, 3, 4, 1], 8) is [[0, 1], [2, 3]].

    Raises ValueError for a document that is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index, need in enumerate(lengths):
        if need > length:
            raise ValueError(f"a document has {need} positions, more than a row of {length}: raise data.max_length")
        row = next((row for row, space in enumerate(free) if space >= need), None)
        if row is None:
            rows.append([index])
            free.append(length - need)
        else:
            rows[row].append(index)
            free[row] -= need
    return rows
