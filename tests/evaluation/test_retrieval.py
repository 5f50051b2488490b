"""Retrieval ranks by exact pixel distance and reports honest intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nextflow.evaluation.retrieval import retrieve, squared_distances, wilson


def gallery(count: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)


def test_distances_are_mean_squared_differences_exactly():
    pictures, drawings = gallery(3, 1), gallery(7, 2)
    expected = ((pictures[:, None].astype(float) - drawings[None]) ** 2).reshape(3, 7, -1).sum(-1) / 60
    assert np.array_equal(squared_distances(pictures, drawings, chunk=2), expected)
    assert squared_distances(drawings, drawings).diagonal().tolist() == [0.0] * 7
    with pytest.raises(ValueError, match="resize"):
        squared_distances(pictures, drawings[:, :4])


def test_ranks_count_the_drawings_that_are_nearer():
    grey = [np.full((2, 2, 3), value, dtype=np.uint8) for value in (0, 50, 60, 100, 100, 250)]
    pictures = [np.full((2, 2, 3), value, dtype=np.uint8) for value in (52, 52, 99, 249, 0)]
    # 52 is nearest to 50 (rank 1), then 60, 100 and 100 tie behind; 0 as the answer to 249 comes last.
    found = retrieve(pictures, [[1], [2], [4], [0], [5, 0]], ["train", "train", "train", "held", "held"], grey)
    assert found.ranks == (1, 2, 1, 6, 1)
    assert found.splits["train"].rank_1[:2] == (2, 3) and found.splits["train"].rank_5[:2] == (3, 3)
    assert found.splits["held"].rank_1[:2] == (1, 2) and found.splits["held"].median_rank == 3.5


def test_drawings_retrieve_themselves_through_noise():
    drawings = gallery(50)
    noisy = (
        (drawings.astype(int) + np.random.default_rng(3).integers(-9, 10, drawings.shape)).clip(0, 255).astype(np.uint8)
    )
    found = retrieve(list(noisy), [[index] for index in range(50)], ["all"] * 50, list(drawings))
    assert found.ranks == (1,) * 50


def test_wilson_interval_of_known_cases():
    # 8 of 10: R's binom::binom.wilson(8, 10) gives 0.4901625, 0.9433178.
    assert wilson(8, 10)[2:] == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10).low == 0.0 and wilson(10, 10).high == pytest.approx(1.0)
    assert wilson(0, 0)[2:] == (0.0, 1.0) and math.isnan(wilson(0, 0).value)
