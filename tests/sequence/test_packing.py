"""Packing strategies as functions of numbers: rows are full, nothing is lost, and how far one has read does not matter."""

import random

import pytest

from nextflow.sequence.packing import LOOKAHEAD, TOLERANCE, pack_fixed_budget, pack_fixed_length, pack_padded


def mixed_costs(count, seed=0):
    """Two texts to one picture of about 4,100."""
    draw = random.Random(seed)
    return [draw.uniform(4000, 4200) if draw.random() < 1 / 3 else draw.uniform(20, 900) for _ in range(count)]


def all_rows(costs, budget, ahead):
    """Rows of the whole stream when `ahead(number)` documents beyond the need are read before row `number` is chosen."""
    waiting, rows, read = [], [], 0
    while True:
        row = pack_fixed_budget([costs[i] for i in waiting], budget)
        if row is None or len(waiting) < ahead(len(rows)):
            if read == len(costs):
                return rows
            waiting.append(read)
            read += 1
            continue
        rows.append([waiting[i] for i in row])
        taken = set(row)
        waiting = [document for i, document in enumerate(waiting) if i not in taken]


def test_the_examples_of_the_docstrings():
    assert pack_padded([5, 3]) == [[0], [1]]
    assert pack_fixed_length([5, 3, 4, 1], 8) == [[0, 1], [2, 3]]
    assert pack_fixed_budget([5, 4, 2, 3, 9, 9], 9, 3) == [0, 1]


@pytest.mark.parametrize("budget", [8192, 10000, 16384, 20000])
def test_rows_are_near_the_budget(budget):
    costs = mixed_costs(3000)
    rows = all_rows(costs, budget, lambda _: 0)
    work = [sum(costs[i] for i in row) for row in rows]
    assert max(work) <= budget * (1 + TOLERANCE + 0.005)  # and rounding to parts of a budget
    assert sum(work) / len(work) > 0.94 * budget
    assert sum(w > 0.9 * budget for w in work) > 0.85 * len(work)


def test_no_document_is_lost_or_used_twice_and_the_first_is_always_taken():
    costs = mixed_costs(500)
    rows = all_rows(costs, 16384, lambda _: 0)
    used = [document for row in rows for document in row]
    assert len(used) == len(set(used))
    waiting = list(range(len(costs)))
    for row in rows:
        assert row[0] == waiting[0]
        waiting = [document for document in waiting if document not in set(row)]
    # What is left is less than the documents that a row is chosen from.
    assert sum(costs[document] for document in waiting) < LOOKAHEAD * 16384


def test_rows_do_not_depend_on_how_far_one_has_read():
    costs = mixed_costs(500)
    plain = all_rows(costs, 12000, lambda _: 0)
    draw = random.Random(1)
    far = all_rows(costs, 12000, lambda _: draw.randrange(200))
    assert far == plain[: len(far)] and len(far) > 60


def test_the_end_of_a_data_set():
    assert pack_fixed_budget([3, 3, 3], 8) is None
    assert pack_fixed_budget([3, 3, 3], 8, lookahead=0) == [0, 1]
    assert pack_fixed_budget([], 8, lookahead=0) is None


def test_a_document_above_the_budget_is_refused():
    assert pack_fixed_budget([8, 8, 8, 8], 8) == [0]
    with pytest.raises(ValueError, match=r"costs 9 positions, more than a row: raise data\.budget"):
        pack_fixed_budget([3, 9], 8)
