"""Which codes are fed: the right number of them, drawn from the softmax over the nearest, by seed alone."""

import pytest
import torch

from nextflow.sequence.correction import Correction


def test_fed_codes_by_brute_force() -> None:
    images, codes, nearest = 500, 5, 4
    correction = Correction(fraction=0.6, temperature=0.5)
    index_MT = torch.arange(nearest).expand(images * codes, nearest)
    distance_MT = torch.tensor([0.0, 0.2, 0.5, 1.0]).expand(images * codes, nearest)
    target_BN = torch.full((images, codes), 9)  # no entry of the table, so that drawn positions are seen
    seed_B = correction.seeds(range(images))
    chosen_B = torch.arange(images) % 2 == 0
    fed_BN = correction.fed_codes(2, distance_MT, index_MT, target_BN, seed_B, chosen_B)
    drawn_BN = fed_BN != 9
    assert (drawn_BN.sum(1) == torch.where(chosen_B, 3, 0)).all()  # 60 % of 5
    # Each position as often as any other, each entry as often as the softmax says.
    assert (drawn_BN[chosen_B].float().mean(0) - 0.6).abs().max() < 0.1
    share = torch.bincount(fed_BN[drawn_BN], minlength=nearest) / drawn_BN.sum()
    torch.testing.assert_close(share, (-distance_MT[0] / 0.5).softmax(0), atol=0.06, rtol=0)
    # An image is what its seed says, whatever stands beside it; another scale draws anew.
    alone = correction.fed_codes(2, distance_MT[:5], index_MT[:5], target_BN[:1], seed_B[4:5], chosen_B[4:5])
    assert torch.equal(alone[0], fed_BN[4])
    assert not torch.equal(correction.fed_codes(3, distance_MT, index_MT, target_BN, seed_B, chosen_B), fed_BN)


def test_probability_chooses_images_by_seed() -> None:
    names = [f"drawings/{number}.0" for number in range(2000)]
    chosen = [Correction(probability=p, seed=3).chosen(Correction(seed=3).seeds(names)) for p in (0.0, 0.3, 0.7, 1.0)]
    assert not chosen[0].any() and chosen[3].all()
    assert chosen[1].float().mean() == pytest.approx(0.3, abs=0.04)
    assert (chosen[2] | ~chosen[1]).all()  # who is chosen at 0.3 is at 0.7
    other = Correction(probability=0.3, seed=4)
    assert not torch.equal(other.chosen(other.seeds(names)), chosen[1])


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"fraction": 1.5}, {"probability": -0.1}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Correction(**wrong)
    for wrong in ({"top_k": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="top_k must be at least 1"):
            Correction(**wrong)
