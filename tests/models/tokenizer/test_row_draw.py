"""Draws follow the weights, do not repeat, and are a function of seed, image and row."""

import pytest
import torch

from nextflow.models.tokenizer.row_draw import best_row_of_each, best_rows, draw_keys


def test_first_draws_are_proportional_to_weight_and_second_ones_to_what_is_left():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0]])
    draws = 4000
    order = torch.stack([draw_keys(weight, seed).argsort(descending=True) for seed in range(draws)])
    first = torch.bincount(order[:, 0], minlength=5) / draws
    torch.testing.assert_close(first, weight[0] / 10, rtol=0, atol=0.03)  # 4 standard deviations
    second = torch.bincount(order[order[:, 0] == 3, 1], minlength=5) / (order[:, 0] == 3).sum()
    torch.testing.assert_close(second, torch.tensor([1, 2, 3, 0, 0]) / 6, rtol=0, atol=0.06)
    assert (order[:, -1] == 4).all()


def test_keys_look_independent_over_seeds_images_and_rows():
    keys = torch.stack([draw_keys(torch.ones(64, 50), seed) for seed in range(8)])
    noise = (-(-keys).exp()).exp()  # Gumbel -> uniform
    assert len(keys.unique()) == keys.numel()
    assert noise.mean() == pytest.approx(0.5, abs=0.01) and noise.var() == pytest.approx(1 / 12, abs=0.003)
    for axis in (noise.flatten(1), noise.view(8, 64, 50).transpose(0, 1).flatten(1), noise.view(-1, 50).T):
        assert torch.corrcoef(axis).fill_diagonal_(0).abs().max() < 5 / axis.shape[1] ** 0.5


def test_rows_come_in_the_order_of_their_keys_and_again_when_there_are_too_few():
    key = torch.tensor([0.5, 3.0, -1.0, 2.0], dtype=torch.float64)
    rows = torch.arange(4.0)[:, None]
    assert best_rows(key, rows, 3).flatten().tolist() == [1, 3, 0]
    assert best_rows(key, rows, 6).flatten().tolist() == [1, 3, 0, 2, 1, 3]


def test_each_entry_gets_its_own_best_row_or_keeps_what_it_had():
    key = torch.tensor([0.5, 3.0, -1.0, 2.0], dtype=torch.float64)
    rows, entry = torch.arange(4.0)[:, None], torch.tensor([2, 0, 2, 0])
    assert best_row_of_each(key, entry, rows, torch.full((3, 1), 9.0)).flatten().tolist() == [1, 9, 0]


def test_rows_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="diverged"):
        best_rows(draw_keys(torch.full((2, 3), torch.nan), 0), torch.full((6, 1), torch.nan), 2)
