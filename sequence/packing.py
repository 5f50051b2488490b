"""Which documents share a row: strategies as functions from lengths or costs to rows of indices.

A strategy sees numbers alone, so that it can be tested and compared without building a single sequence.

    padded          one document per row, as long as the longest of its batch
    fixed_length    rows of one length, filled with documents: no padding, but a row of one long document costs more than
                    one of many short ones, because attention grows with the square of a document
    fixed_budget    one row per batch, filled up to one cost (paper section 4): ranks that wait for each other cost the same
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nextflow.sequence.documents import Document, TextSegment
from nextflow.sequence.scales import num_codes_of

Packing = Literal["padded", "fixed_length", "fixed_budget"]

LOOKAHEAD = 4
"""Budgets of documents that a row is chosen from. Each one more is memory, and documents to read again after a resume."""
TOLERANCE = 0.05
"""How far a row may lie above the budget, as a fraction. With none, a budget of two images that are one percent too large
would make rows of one."""
# Costs are compared in these parts of a budget.
UNITS = 4096


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


def pack_fixed_budget(costs: Sequence[float], budget: float, lookahead: int = LOOKAHEAD) -> list[int] | None:
    """The next row of a stream of documents: pack_fixed_budget([5, 4, 2, 3, 9, 9], 9, 3) is [0, 1].

    Of the first documents that together cost `lookahead` budgets, those are taken whose cost is nearest to the budget. The
    very first is always among them, so that none waits longer than those in front of it. Documents behind do not matter:
    a stream gives the same rows however far it has been read, which exact resume needs.

    Args:
        costs: of the documents that are in no row yet, in the order of the stream.
        budget: cost of a row; it may lie TOLERANCE above.
        lookahead: how many budgets of documents to choose from; 0 takes all that there are, for the end of a data set.

    Returns:
        Indices into `costs`, or None where the stream must be read further.

    Raises ValueError for a document that costs more than the budget.
    """
    total, count = 0.0, 0
    while count < len(costs) and (not lookahead or total < lookahead * budget):
        if costs[count] > budget:
            raise ValueError(f"a document costs {costs[count]:.0f} positions, more than a row: raise data.budget")
        total += costs[count]
        count += 1
    if not count or total < lookahead * budget:
        return None
    return _nearest_subset([max(1, round(cost / budget * UNITS)) for cost in costs[:count]], UNITS)


def _nearest_subset(costs: list[int], target: int) -> list[int]:
    """Indices, 0 among them, of costs whose sum is nearest to `target`, earlier ones where there is a choice."""
    limit = int(target * (1 + TOLERANCE))
    # Bit s of reach[i]: some of the first i + 1 costs, with the very first, sum to s.
    reach = [1 << costs[0]]
    for cost in costs[1:]:
        reach.append((reach[-1] | reach[-1] << cost) & ((2 << limit) - 1))
    sums = (total for distance in range(target + 1) for total in (target - distance, target + distance))
    total = next(total for total in sums if reach[-1] >> total & 1)
    chosen = []
    for index in range(len(costs) - 1, 0, -1):
        if not reach[index - 1] >> total & 1:
            chosen.append(index)
            total -= costs[index]
    return [0, *reversed(chosen)]
