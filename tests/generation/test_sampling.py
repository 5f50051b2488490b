"""Sampling draws what the rule allows, in the right proportions, from each request's own numbers."""

from __future__ import annotations

import math

import pytest
import torch

from nextflow.generation.sampling import Rule, SamplingConfig, draw_noise, guidance_scale, guide, sample


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return draw_noise(torch.Generator().manual_seed(seed), count)


def test_guidance_ramps_from_zero_to_the_full_value():
    assert [guidance_scale(5.0, k, 5) for k in range(5)] == [0.0, 1.25, 2.5, 3.75, 5.0]
    assert guidance_scale(5.0, 0, 1) == 5.0
    assert [guidance_scale((0.0, 2.0, 1.0), k, 5) for k in range(5)] == [0.0, 2.0, 1.0, 1.0, 1.0]
    conditional, unconditional = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    guided = guide(conditional, unconditional, torch.tensor([0.0, 2.0]))
    assert torch.equal(guided, torch.tensor([[1.0, 2.0], [3.0, -2.0]]))  # 3 * conditional - 2 * unconditional


def test_frequencies_are_those_of_the_tempered_softmax():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 40_000
    drawn = sample(logits_V.expand(count, -1), noise(count), Rule(temperature=0.5))
    expected_V = (logits_V / 0.5).softmax(-1)
    frequency_V = torch.bincount(drawn.index_M, minlength=4) / count
    assert (frequency_V - expected_V).abs().max() < 5 * math.sqrt(0.25 / count)
    torch.testing.assert_close(drawn.sampled_logprob_M, expected_V.log()[drawn.index_M])


def test_top_k_then_top_p_cut_and_renormalise():
    # Probabilities 0.4, 0.3, 0.2, 0.1 in shuffled places.
    logits_V = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()
    count = 4_000
    rows_MV = logits_V.expand(count, -1)
    assert set(sample(rows_MV, noise(count), Rule(top_k=2)).index_M.tolist()) == {1, 3}
    # 0.4 + 0.3 reaches 0.65: two stay, renormalised to 4/7 and 3/7.
    drawn = sample(rows_MV, noise(count), Rule(top_p=0.65))
    assert set(drawn.index_M.tolist()) == {1, 3}
    of_first = drawn.sampled_logprob_M[drawn.index_M == 1]
    torch.testing.assert_close(of_first, torch.full_like(of_first, math.log(4 / 7)))
    # Top-p is of what top-k left: among three, 0.4 / 0.9 + 0.3 / 0.9 = 0.78 is short of 0.8, so the third stays.
    assert set(sample(rows_MV, noise(count), Rule(top_k=3, top_p=0.8)).index_M.tolist()) == {0, 1, 3}
    assert set(sample(rows_MV, noise(count), Rule(top_k=3, top_p=0.75)).index_M.tolist()) == {1, 3}
    assert set(sample(rows_MV, noise(count), Rule(top_p=1e-6)).index_M.tolist()) == {1}


@pytest.mark.parametrize("vocabulary", [127, 128, 129, 1000])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(vocabulary):
    """Drawn in chunks, as if there were none."""
    logits_MV = 3 * torch.randn(200, vocabulary, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits_MV, noise(200), Rule())
    cumulative_MV = logits_MV.double().softmax(-1).cumsum(-1)
    before_M = (cumulative_MV - logits_MV.double().softmax(-1)).gather(1, drawn.index_M[:, None])[:, 0]
    after_M = cumulative_MV.gather(1, drawn.index_M[:, None])[:, 0]
    assert (before_M - 1e-6 <= noise(200)).all() and (noise(200) <= after_M + 1e-6).all()
    expected_M = logits_MV.log_softmax(-1).gather(1, drawn.index_M[:, None])[:, 0]
    torch.testing.assert_close(drawn.sampled_logprob_M, expected_M)


@pytest.mark.parametrize("rule", [Rule(), Rule(top_k=3), Rule(top_p=0.9)])
def test_the_extremes_of_the_noise_never_draw_what_has_no_probability(rule):
    logits_MV = torch.tensor([[-math.inf, 0.0, 1.0, 0.5, -math.inf]]).expand(2, -1)
    extremes = torch.tensor([0.0, 1.0 - 2**-24])
    drawn = sample(logits_MV, extremes, rule)
    assert all(1 <= index <= 3 for index in drawn.index_M.tolist())
    assert torch.isfinite(drawn.sampled_logprob_M).all()


def test_a_position_is_drawn_from_its_own_row_and_number_alone():
    logits_MV = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    numbers = noise(50)
    together = sample(logits_MV, numbers, Rule(top_k=10, top_p=0.9)).index_M
    alone = [sample(logits_MV[m : m + 1], numbers[m : m + 1], Rule(top_k=10, top_p=0.9)).index_M for m in range(50)]
    assert torch.equal(together, torch.cat(alone))
    greedy = sample(logits_MV, numbers, Rule(greedy=True))
    assert torch.equal(greedy.index_M, logits_MV.argmax(-1)) and not greedy.sampled_logprob_M.any()


def test_lists_give_one_value_per_scale_and_their_last_value_holds():
    config = SamplingConfig(temperature=[1.0, 0.5], top_k=[0, 10, 2], top_p=0.9)
    assert config.of_scale(0) == Rule(1.0, 0, 0.9, False)
    assert config.of_scale(1) == Rule(0.5, 10, 0.9, False)
    assert config.of_scale(6) == Rule(0.5, 2, 0.9, False)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": []}, {"top_p": [0.5, 0.0]}, {"top_k": -1}, {"text_top_p": 1.5}]
)
def test_values_out_of_range_name_the_key(wrong):
    with pytest.raises(ValueError, match=f"sampling.{next(iter(wrong))}"):
        SamplingConfig(**wrong)
