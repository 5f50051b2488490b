"""The cache gives each row back what it appended, in order, and who sees whom is the law of visibility."""

from __future__ import annotations

import torch

from nextflow.generation.cache import KVCache
from nextflow.kernels.attention import Visibility


def append(cache: KVCache, layer: int, values_BN: torch.Tensor):
    """Keys whose entries are `values_BN`, values their negatives; one head of width 1."""
    return cache.append(layer, values_BN[:, None, :, None].float(), -values_BN[:, None, :, None].float())


def seen(visible, rows: int, new: int, length: int) -> torch.Tensor:
    """[rows, new, length], whatever form the law has."""
    if visible is None:
        return torch.ones(rows, new, length, dtype=torch.bool)
    return (visible.mask_BLL() if isinstance(visible, Visibility) else visible).expand(rows, new, length)


def test_rows_of_different_lengths_keep_their_own_order():
    cache = KVCache(batch=2, layers=2, capacity=6)
    cache.begin(torch.tensor([[0, 1, 2], [0, 0, 0]]), [3, 1])
    first = [append(cache, layer, torch.tensor([[10, 11, 12], [20, 99, 99]])) for layer in range(2)]
    cache.begin(torch.tensor([[3, 3], [1, 1]]), [1, 2])
    second = [append(cache, layer, torch.tensor([[13, 99], [21, 22]])) for layer in range(2)]
    assert cache.lengths == (4, 3)
    for (key_BGLD, value_BGLD, _), length in ((first[0], 3), (second[0], 4), (second[1], 4)):
        assert key_BGLD.shape[2] == length and torch.equal(key_BGLD, -value_BGLD)
    key_BGLD, _, visible = second[1]
    assert key_BGLD[0, 0, :4, 0].tolist() == [10, 11, 12, 13]
    assert key_BGLD[1, 0, :3, 0].tolist() == [20, 21, 22]
    visible_BNL = seen(visible, 2, 2, 4)
    assert visible_BNL[0, 0].tolist() == [True, True, True, True]
    assert visible_BNL[1].tolist() == [[True, True, True, False]] * 2, (
        "a block sees itself; the shorter row ends earlier"
    )


def test_prompts_of_blocks_follow_the_law():
    cache = KVCache(batch=2, layers=1, capacity=8)
    block_BN = torch.tensor([[0, 1, 2, 2, 2, 3], [0, 1, 1, 9, 9, 9]])
    cache.begin(block_BN, [6, 3])
    *_, visible = append(cache, 0, torch.zeros(2, 6))
    visible_BNN = seen(visible, 2, 6, 6)
    law_BNN = block_BN[:, None, :] <= block_BN[:, :, None]
    assert torch.equal(visible_BNN[0], law_BNN[0]) and torch.equal(visible_BNN[1, :3, :3], law_BNN[1, :3, :3])
    assert not visible_BNN[1, :3, 3:].any()


def test_several_blocks_behind_what_is_cached_follow_the_law():
    cache = KVCache(batch=2, layers=1, capacity=8)
    cache.begin(torch.tensor([[0, 1, 2], [0, 1, 1]]), [3, 2])
    append(cache, 0, torch.zeros(2, 3))
    cache.begin(torch.tensor([[3, 3, 4], [2, 3, 3]]), [3, 3])
    *_, visible = append(cache, 0, torch.zeros(2, 3))
    first, second = seen(visible, 2, 3, 6).int().tolist()
    assert first == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert second == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]]


def test_one_block_of_equally_long_rows_needs_no_mask():
    cache = KVCache(batch=2, layers=1, capacity=8)
    for block, count in ((0, 1), (1, 4)):
        cache.begin(torch.full((2, count), block), [count, count])
        key_BGLD, _, visible = append(cache, 0, torch.zeros(2, count))
        assert visible is None
    assert key_BGLD.shape[2] == 5


def test_a_step_of_some_rows_leaves_the_others_as_they_are():
    cache = KVCache(batch=3, layers=1, capacity=4)
    cache.begin(torch.zeros(3, 1, dtype=torch.int64), [1, 1, 1])
    append(cache, 0, torch.tensor([[1], [2], [3]]))
    cache.begin(torch.ones(2, 1, dtype=torch.int64), [1, 1], rows=[2, 0])
    key_RGLD, _, visible = append(cache, 0, torch.tensor([[33], [11]]))
    assert visible is None and key_RGLD[:, 0, :, 0].tolist() == [[3, 33], [1, 11]]
    assert cache.lengths == (2, 1, 2)
    cache.begin(torch.full((3, 1), 2), [1, 1, 1])
    key_BGLD, _, visible = append(cache, 0, torch.tensor([[111], [22], [333]]))
    assert key_BGLD[0, 0, :, 0].tolist() == [1, 11, 111] and key_BGLD[1, 0, :2, 0].tolist() == [2, 22]
    assert seen(visible, 3, 1, 3)[:, 0].tolist() == [[True] * 3, [True, True, False], [True] * 3]


def test_select_moves_and_copies_rows_with_their_lengths():
    cache = KVCache(batch=3, layers=1, capacity=4)
    cache.begin(torch.zeros(3, 2, dtype=torch.int64), [1, 2, 1])
    append(cache, 0, torch.tensor([[1, 0], [2, 3], [4, 0]]))
    cache.select([2, 1, 1])
    assert cache.lengths == (1, 2, 2)
    cache.begin(torch.ones(3, 1, dtype=torch.int64), [1, 1, 1])
    key_BGLD, _, visible = append(cache, 0, torch.tensor([[5], [6], [7]]))
    assert key_BGLD[0, 0, :2, 0].tolist() == [4, 5]
    assert key_BGLD[1:, 0, :3, 0].tolist() == [[2, 3, 6], [2, 3, 7]]
    assert seen(visible, 3, 1, 3)[:, 0].tolist() == [[True, True, False], [True] * 3, [True] * 3]


def test_a_cache_grows_with_its_longest_row():
    cache = KVCache(batch=2, layers=1, capacity=2)
    numbers = torch.arange(2 * 9).view(2, 9)
    for start in range(9):
        cache.begin(torch.full((2, 1), start), [1, 1])
        key_BGLD, value_BGLD, _ = append(cache, 0, numbers[:, start : start + 1])
    assert torch.equal(key_BGLD[:, 0, :, 0], numbers.float()) and torch.equal(value_BGLD, -key_BGLD)
