"""What a curve says in spite of its noise."""

import numpy as np
import pytest

from nextflow.diagnosis.curve import Curve


def curve(values) -> Curve:
    return Curve("loss", np.arange(len(values)), np.asarray(values, dtype=float))


def random(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_noise_is_that_around_the_trend(slope: float) -> None:
    spikes = np.where(np.arange(400) % 50 == 25, 100.0, 0.0)
    assert curve(slope * np.arange(400) + 0.3 * random(400, 0) + spikes).noise == pytest.approx(0.3, rel=0.25)
    assert curve([1.0, 2.0, 3.0]).noise == 0


def test_noise_alone_is_hardly_ever_a_change_or_a_rise() -> None:
    flat = [curve(5 + random(60, seed)) for seed in range(200)]
    assert sum(one.change != 0 for one in flat) <= 2
    assert sum(one.rise() is not None for one in flat) <= 2


def test_falls_and_rises() -> None:
    down = curve(8 * np.exp(-np.arange(100) / 20) + 2 + 0.1 * random(100, 1))
    assert down.change < -3 and down.rise() is None
    back = curve(np.concatenate([np.linspace(8, 2, 60), np.linspace(2, 6, 40)]) + 0.1 * random(100, 2))
    rise = back.rise()
    assert rise is not None and 50 <= rise.step <= 70 and rise.low == pytest.approx(2.2, abs=0.4) and rise.end > 5
    assert curve([8.0, 2.0, 3.0]).rise() is None  # too few points to tell


def test_parts() -> None:
    line = curve(np.arange(100))
    assert line.since(90).value_N.tolist() == list(range(90, 100))
    assert len(line.behind(0.2)) == 81
    assert line.at(50, window=3) == 49 and line.at(200, window=3) is None
    assert curve([1, np.nan, np.inf, 2]).finite.value_N.tolist() == [1, 2]
