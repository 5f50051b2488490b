"""Mixtures: weighted sums in which what does not apply counts nothing."""

import pytest
import torch

from nextflow.rewards.mixture import RewardMixture
from nextflow.rewards.reward import Reward

IMAGES = [torch.zeros(3, 4, 4, dtype=torch.uint8)] * 3
PROMPTS, METADATA = ["a", "b", "c"], [{}, {}, {}]


class Fixed(Reward):
    def __init__(self, *scores, mask=None):
        self.scores, self.mask = scores, mask

    def __call__(self, images, prompts, metadata):
        return torch.tensor(self.scores)

    def masks(self, images, prompts, metadata):
        return [self.mask] * len(images)


def test_weights_and_scores_that_do_not_apply():
    mixture = RewardMixture({"x": Fixed(1.0, float("nan"), 3.0), "y": Fixed(10.0, 20.0, float("nan"))}, {"y": 0.5})
    scores = mixture(IMAGES, PROMPTS, METADATA)
    assert scores.total_N.tolist() == [6.0, 10.0, 3.0]
    assert scores.by_name["x"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ({}, None, "model.rewards is empty"),
        ({"x": Fixed(1.0)}, {"z": 1.0}, r"model.reward_weights names \['z'\]"),
    ],
)
def test_wrong_settings(rewards, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardMixture(rewards, weights)


def test_wrong_scores():
    with pytest.raises(ValueError, match=r"model.rewards.x returned scores of shape \(2,\) for 3 pictures"):
        RewardMixture({"x": Fixed(1.0, 2.0)})(IMAGES, PROMPTS, METADATA)
    with pytest.raises(ValueError, match="applies to the prompt 'b'"):
        RewardMixture({"x": Fixed(1.0, float("nan"), 2.0)})(IMAGES, PROMPTS, METADATA)


def test_masks_are_united():
    left, right = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    left[0, 0] = right[1, 1] = True
    mixture = RewardMixture({"x": Fixed(mask=left), "y": Fixed(mask=right), "z": Fixed()})
    assert torch.equal(mixture.masks(IMAGES, PROMPTS, METADATA)[0], left | right)
    assert RewardMixture({"z": Fixed()}).masks(IMAGES, PROMPTS, METADATA) == [None, None, None]
