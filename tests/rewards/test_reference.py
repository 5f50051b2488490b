"""ReferenceReward: 1 for the known picture, less for each pixel that is off, NaN where no picture is known."""

import pytest
import torch

from nextflow.rewards.reference import ReferenceReward

KNOWN = torch.full((3, 8, 8), 200, dtype=torch.uint8)


def score(image, known=KNOWN):
    return float(ReferenceReward()([image], [""], [{"reference": known}]))


def test_nearer_is_better():
    assert score(KNOWN) == 1.0 and score(torch.zeros_like(KNOWN)) == 0.0
    half = KNOWN.clone()
    half[:, :4] -= 51
    assert score(half) == pytest.approx(1 - 0.5 * (51 / 255) / 0.25, abs=1e-6)
    assert score(half) > score(KNOWN - 51) == pytest.approx(1 - 0.2 / 0.25, abs=1e-6)


def test_sizes_may_differ_and_none_may_be_known():
    assert score(KNOWN, KNOWN.repeat(1, 2, 2)) == 1.0
    assert score(KNOWN, None) != score(KNOWN, None)  # NaN
    assert ReferenceReward()([KNOWN], [""], [{}]).isnan().all()
