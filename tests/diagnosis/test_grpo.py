"""The checks of reinforcement learning, on curves that are drawn."""

import numpy as np
import pytest

from nextflow.diagnosis.grpo import GRPO

NOISE = 0.01 * np.random.default_rng(0).standard_normal(60)
RISING = np.linspace(0.2, 0.5, 60) + NOISE
FLAT = np.full(60, 0.2) + NOISE
GOOD = {
    "grpo/reward": RISING,
    "val/reward": np.linspace(0.2, 0.4, 4),
    "grpo/kl": np.linspace(0, 0.1, 60),
    "grpo/entropy": 2 - RISING,
    "grpo/frac_reward_zero_std": np.zeros(60),
    "grpo/ratio": np.ones(60),
    "grpo/clip_ratio/region_mean": np.zeros(60),
    "grpo/sampling/sampling_logp_difference/mean": np.full(60, 1e-6),
}
CONFIG = {"model": {"init_args": {"num_iterations": 1, "objective": {"beta": 0.01}}}}


def said(run):
    return [one for check in GRPO for one in check(run)]


def test_a_good_run(drawn, findings, missing) -> None:
    run = drawn(GOOD, CONFIG)
    assert findings(said(run)) == {} and missing(said(run)) == []


@pytest.mark.parametrize(
    ("curves", "about", "words"),
    [
        ({"grpo/reward": FLAT}, "reward", "noise may explain"),
        ({"grpo/reward": RISING[::-1]}, "reward", "grpo/reward fell"),
        ({"val/reward": np.array([0.4, 0.2])}, "reward", "val/reward fell from 0.4 to 0.2, while"),
        ({"grpo/rewards/count/mean": RISING[::-1]}, "reward", "grpo/rewards/count/mean fell"),
        ({"grpo/kl": np.linspace(0, 1, 60)}, "KL", "model.objective.beta (now 0.01)"),
        ({"grpo/entropy": np.linspace(2, 0.1, 60)}, "entropy", "grow alike"),
        ({"grpo/entropy": np.linspace(1, 3, 60)}, "entropy", "less and less sure"),
        ({"grpo/frac_reward_zero_std": np.full(60, 0.8)}, "groups", "80% of the groups"),
        ({"grpo/clip_ratio/region_mean": np.full(60, 0.4)}, "clipping", "40% of the actions"),
        ({"grpo/ratio": np.full(60, 1.2)}, "ratio", "off 1 by 0.2"),
        ({"grpo/sampling/sampling_logp_difference/mean": np.full(60, 0.3)}, "ratio", "disagree"),
    ],
)
def test_faults(drawn, findings, curves, about, words) -> None:
    found = findings(said(drawn(GOOD | curves, CONFIG)))
    assert list(found) == [about] and words in found[about].sentence


def test_further_inner_steps_move_the_ratio(drawn, findings) -> None:
    config = {"model": {"init_args": {"num_iterations": 4}}}
    assert not findings(said(drawn(GOOD | {"grpo/ratio": np.full(60, 1.01)}, config)))


def test_what_is_not_there_is_no_fault(drawn, findings, missing) -> None:
    run = drawn({"grpo/reward": [0.1, 0.2]})
    assert findings(said(run)) == {} and missing(said(run)) == ["whether the reward rises", "how far the policy went"]
