"""Scores of pictures that are right, swapped, or nothing at all."""

import numpy as np
import pytest

from nextflow.benchmarks.scene_judge import compare


@pytest.fixture
def gallery() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


def test_the_scenes_themselves_are_right(gallery: np.ndarray) -> None:
    scores = compare(gallery, gallery, np.arange(20))
    assert scores == {"rank_1": 1.0, "rank_5": 1.0, "nearer": 0.0, "distance": 0.0}


def test_scenes_of_others_are_wrong(gallery: np.ndarray) -> None:
    """Each picture is another one's scene, which at least is nearer than its own."""
    scores = compare(np.roll(gallery, 1, axis=0), gallery, np.arange(20))
    assert scores["rank_1"] == 0.0
    assert scores["nearer"] >= 1 / 19
    assert scores["distance"] > 1000


def test_pictures_that_know_nothing_are_as_near_to_any(gallery: np.ndarray) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    scores = compare(noise, gallery, np.arange(200) % 20)
    assert scores["nearer"] == pytest.approx(0.5, abs=0.05)
    assert scores["rank_1"] == pytest.approx(1 / 20, abs=0.05)
