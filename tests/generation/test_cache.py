"""The cache gives each row back what it appended, in order, and the mask is the law of visibility."""

from __future__ import annotations

import pytest
import torch

from nextflow.generation.cache import KVCache


def append(cache: KVCache, layer: int, values_BN: torch.Tensor):
    """Keys whose entries are `values_BN`, values their negatives; one head of width 1."""
    return cache.append(layer, values_BN[:, None, :, None].float(), -values_BN[:, None, :, None].float())


def test_rows_of_different_lengths_keep_their_own_order():
    cache = KVCache(batch=2, layers=2, capacity=6)
    cache.begin(torch.tensor([[0, 1, 2], [0, 0, 0]]), [3, 1])
    first = [append(cache, layer, torch.tensor([[10, 11, 12], [20, 99, 99]])) for layer in range(2)]
    cache.begin(torch.tensor([[3, 3], [1, 1]]), [1, 2])
    second = [append(cache, layer, torch.tensor([[13, 99], [21, 22]])) for layer in range(2)]
    assert cache.lengths == (4, 3)
    for (keys_BGLD, values_BGLD, _), length in ((first[0], 3), (second[0], 4), (second[1], 4)):
        assert keys_BGLD.shape[2] == length and torch.equal(keys_BGLD, -values_BGLD)
    keys_BGLD, _, visible_BNL = second[1]
    assert keys_BGLD[0, 0, :4, 0].tolist() == [10, 11, 12, 13]
    assert keys_BGLD[1, 0, :3, 0].tolist() == [20, 21, 22]
    assert visible_BNL[0, 0].tolist() == [True, True, True, True]
    assert (
        visible_BNL[1].tolist() == [[True, True, True, False]] * 2
    )  # a block sees itself; the shorter row ends earlier


def test_a_prompt_of_blocks_follows_the_law():
    cache = KVCache(batch=1, layers=1, capacity=8)
    block_BN = torch.tensor([[0, 1, 2, 2, 2, 3]])
    cache.begin(block_BN, [6])
    *_, visible_BNL = append(cache, 0, torch.arange(6)[None])
    assert torch.equal(visible_BNL, block_BN[:, None, :] <= block_BN[:, :, None])


def test_one_block_of_equally_long_rows_needs_no_mask():
    cache = KVCache(batch=2, layers=1, capacity=8)
    for block, count in ((0, 1), (1, 4)):
        cache.begin(torch.full((2, count), block), [count, count])
        keys_BGLD, _, visible_BNL = append(cache, 0, torch.zeros(2, count))
        assert visible_BNL is None
    assert keys_BGLD.shape[2] == 5


def test_padding_is_never_read_and_full_rows_are_not_overwritten():
    cache = KVCache(batch=2, layers=1, capacity=3)
    cache.begin(torch.tensor([[0, 0, 0], [0, 0, 0]]), [3, 1])
    append(cache, 0, torch.tensor([[1, 2, 3], [4, torch.iinfo(torch.int64).max, 0]]))
    cache.begin(torch.tensor([[0, 0], [1, 1]]), [0, 2])  # row 0 is finished and full
    keys_BGLD, _, visible_BNL = append(cache, 0, torch.tensor([[99, 99], [5, 6]]))
    assert keys_BGLD[0, 0, :, 0].tolist() == [1, 2, 3] and keys_BGLD[1, 0, :, 0].tolist() == [4, 5, 6]
    assert visible_BNL.any(dim=-1).all(), "a query without keys would be NaN"


def test_keep_moves_rows_with_their_lengths():
    cache = KVCache(batch=3, layers=1, capacity=4)
    cache.begin(torch.zeros(3, 2, dtype=torch.int64), [1, 2, 1])
    append(cache, 0, torch.tensor([[1, 0], [2, 3], [4, 0]]))
    cache.keep([2, 1])
    assert cache.lengths == (1, 2)
    cache.begin(torch.ones(2, 1, dtype=torch.int64), [1, 1])
    keys_BGLD, _, visible_BNL = append(cache, 0, torch.tensor([[5], [6]]))
    assert keys_BGLD[0, 0, :2, 0].tolist() == [4, 5] and keys_BGLD[1, 0, :3, 0].tolist() == [2, 3, 6]
    assert visible_BNL[:, 0].tolist() == [[True, True, False], [True, True, True]]


def test_overflow_is_refused():
    cache = KVCache(batch=1, layers=1, capacity=2)
    with pytest.raises(ValueError, match="capacity is 2"):
        cache.begin(torch.zeros(1, 3, dtype=torch.int64), [3])
