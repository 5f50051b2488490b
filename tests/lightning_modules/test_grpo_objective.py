"""GRPO's arithmetic: against policies whose actions can be enumerated, against sums by hand, and its invariants."""

import math

import pytest
import torch

from nextflow.lightning_modules.grpo_objective import (
    Actions,
    ObjectiveConfig,
    coefficients,
    group_advantages,
    k3,
    middle_return,
    policy_loss,
    propagate_mask,
    scale_weights,
)

REWARDS = torch.tensor([1.0, 0.0, 3.0])


def bandit(logits, drawn):
    """Log-probabilities of draws of a policy with three actions, and one answer of one action for each."""
    count = len(drawn)
    actions = Actions(
        torch.arange(count), torch.arange(count), torch.ones(count, dtype=torch.int64), torch.full((count,), 1 / count)
    )
    return logits.log_softmax(0)[drawn], actions


def test_gradient_on_a_policy_of_three_actions_is_the_closed_form():
    """With every action drawn in proportion to its probability, the gradient of the loss at ratio 1 is that of minus the
    expected advantage: p_a (sum_b p_b A_b - A_a) for logit a."""
    logits = torch.tensor([0.0, math.log(2.0), math.log(3.0)], requires_grad=True)  # p = 1/6, 2/6, 3/6
    drawn = torch.tensor([0, 1, 1, 2, 2, 2])
    logprob, actions = bandit(logits, drawn)
    advantage_N = group_advantages(REWARDS[drawn], 6).advantage_N
    loss = policy_loss(logprob, logprob.detach(), None, advantage_N, actions, ObjectiveConfig())
    loss.total.backward()
    p = logits.detach().softmax(0)
    mean = (p * REWARDS).sum()
    # The group's deviation is the unbiased one of its six rewards.
    std = REWARDS[drawn].std()
    advantage = (REWARDS - mean) / (std + 1e-4)
    torch.testing.assert_close(logits.grad, -p * (advantage - (p * advantage).sum()))
    torch.testing.assert_close(loss.total.detach(), -(p * advantage).sum(), atol=1e-6, rtol=0)
    assert torch.equal(loss.ratio_T, torch.ones(6)) and not loss.low_T.any() and not loss.high_T.any()


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradient_after_an_update_is_the_closed_form(beta):
    """Every action drawn in proportion to the old policy, ratios inside of the clipping range: importance sampling makes the
    reward's part that of the new policy, p_a (sum_b p_b A_b - A_a); that of k3 is
    beta sum_b old_b (1 - ref_b / p_b) (1[a = b] - p_a)."""
    drawn = torch.tensor([0, 1, 1, 2, 2, 2])
    old = torch.tensor([1 / 6, 2 / 6, 3 / 6])
    logits = torch.tensor([0.1, 0.6, 1.2], requires_grad=True)
    reference = torch.tensor([0.25, 0.25, 0.5])
    logprob, actions = bandit(logits, drawn)
    config = ObjectiveConfig(epsilon=0.9, epsilon_high=9.0, beta=beta)
    advantage_N = REWARDS[drawn] - REWARDS[drawn].mean()
    loss = policy_loss(
        logprob, old.log()[drawn], reference.log()[drawn] if beta else None, advantage_N, actions, config
    )
    loss.total.backward()
    p = logits.detach().softmax(0)
    advantage = REWARDS - REWARDS[drawn].mean()
    expected = -p * (advantage - (p * advantage).sum())
    expected += beta * sum(old[b] * (1 - reference[b] / p[b]) * (torch.eye(3)[b] - p) for b in range(3))
    torch.testing.assert_close(logits.grad, expected)
    kl = (old * (reference / p - (reference / p).log() - 1)).sum()
    torch.testing.assert_close(loss.total.detach(), beta * kl - (p * advantage).sum(), atol=1e-6, rtol=1e-5)
    assert not torch.equal(loss.ratio_T, torch.ones(6)) and not (loss.low_T | loss.high_T).any()


def test_loss_after_an_update_is_the_clipped_sum_by_hand():
    old, new = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.1, 0.45, 0.45])
    logprob, actions = bandit(new.log(), torch.tensor([0, 1, 2]))
    advantage_N = torch.tensor([-1.0, 2.0, 0.5])
    config = ObjectiveConfig(epsilon=0.2, epsilon_high=0.3, beta=0.1)
    reference = torch.tensor([0.25, 0.25, 0.5]).log()
    loss = policy_loss(logprob, old.log(), reference, advantage_N, actions, config)
    # ratios 0.5, 1.5, 0.9: the first clipped below (0.8), the second above (1.3).
    clipped = min(0.5 * -1, 0.8 * -1) + min(1.5 * 2, 1.3 * 2) + 0.9 * 0.5
    kl = sum(q / p - math.log(q / p) - 1 for p, q in zip(new.tolist(), (0.25, 0.25, 0.5)))
    assert float(loss.total) == pytest.approx((-clipped + 0.1 * kl) / 3, rel=1e-5)
    assert loss.low_T.tolist() == [True, False, False] and loss.high_T.tolist() == [False, True, False]


def test_clipped_actions_have_no_gradient():
    logprob = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)  # ratios 1.65 and 0.61
    actions = Actions(torch.arange(4), torch.arange(4), torch.ones(4, dtype=torch.int64), torch.ones(4))
    advantage_N = torch.tensor([1.0, 1.0, -1.0, -1.0])
    policy_loss(logprob, torch.zeros(4), None, advantage_N, actions, ObjectiveConfig()).total.backward()
    assert (logprob.grad != 0).tolist() == [False, True, True, False]


def test_k3_is_never_negative_and_unbiased():
    p, q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    values = k3(p.log(), q.log())
    assert (values >= 0).all() and torch.equal(k3(p.log(), p.log()), torch.zeros(3))
    torch.testing.assert_close((p * values).sum(), (p * (p / q).log()).sum())


@pytest.mark.parametrize("level", ["scale", "sequence"])
def test_ratios_of_scales_and_sequences(level):
    """Two answers: scales of 1 and 2 cells. A scale's ratio is the product over its cells, a sequence's the geometric mean."""
    difference = torch.tensor([0.1, 0.02, -0.05, 0.0, 0.3, 0.1])
    actions = Actions(
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([0, 1, 1, 2, 3, 3]),
        torch.tensor([1, 2, 2, 1, 2, 2]),
        torch.ones(6),
    )
    config = ObjectiveConfig(importance_sampling_level=level)
    ratio = policy_loss(difference, torch.zeros(6), None, torch.ones(2), actions, config).ratio_T
    sums = {
        "scale": [0.1, -0.03, -0.03, 0.0, 0.4, 0.4],
        "sequence": [0.07 / 3] * 3 + [0.4 / 3] * 3,
    }[level]
    torch.testing.assert_close(ratio, torch.tensor(sums).exp())


def test_advantages():
    reward_N = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    by_group = group_advantages(reward_N, 3)
    torch.testing.assert_close(by_group.advantage_N[:3], torch.tensor([-1.0, 0.0, 1.0]) / 1.0001)
    assert torch.equal(by_group.advantage_N[3:], torch.zeros(3)) and by_group.frac_reward_zero_std == 0.5
    plain = group_advantages(reward_N, 3, "none")
    assert plain.advantage_N.tolist() == [-1, 0, 1, 0, 0, 0]
    batch = group_advantages(reward_N, 3, "batch")
    torch.testing.assert_close(batch.advantage_N, plain.advantage_N / (reward_N.std() + 1e-4))


def test_middle_return_is_its_formula():
    """Equation 10: eta * log((1/K) sum exp(R / eta)); between mean (large eta) and maximum (small eta)."""
    reward_NK = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    expected = [0.7 * math.log((math.exp(1 / 0.7) + math.exp(3 / 0.7)) / 2), 2.0]
    torch.testing.assert_close(middle_return(reward_NK, 0.7), torch.tensor(expected))
    torch.testing.assert_close(middle_return(reward_NK, 1e4), torch.tensor([2.0, 2.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(middle_return(reward_NK, 1e-3), torch.tensor([3.0, 2.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(middle_return(reward_NK[:, :1]), reward_NK[:, 0])


def test_weights_of_scales():
    """One answer of a text id, scales of 1 and 4 cells: 1 / cells^alpha, with mean 1 over codes; a mask leaves cells out."""
    scale, step = torch.tensor([0, 1, 2, 2, 2, 2]), torch.tensor([0, 1, 2, 2, 2, 2])
    rollout = torch.zeros(6, dtype=torch.int64)
    even = scale_weights(scale, step, rollout, torch.ones(6), 0.0, per_step=False)
    assert torch.equal(even, torch.ones(6))
    weight = scale_weights(scale, step, rollout, torch.ones(6), 1.0, per_step=False)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.5, 0.625, 0.625, 0.625, 0.625]))
    masked = scale_weights(scale, step, rollout, torch.tensor([1.0, 1, 1, 0, 0, 0]), 1.0, per_step=False)
    torch.testing.assert_close(masked, torch.tensor([1.0, 1.6, 0.4, 0, 0, 0]))
    per_step = scale_weights(scale, step, rollout, torch.ones(6), 0.5, per_step=True)
    torch.testing.assert_close(per_step, torch.tensor([1.0, 1.0, 0.125, 0.125, 0.125, 0.125]))  # 1/2 over four cells


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
        ("bnpo", [0.25] * 4),
        ("dapo", [0.2] * 4),
        ("dr_grpo", [1 / 20] * 4),
    ],
)
def test_normalisers(loss_type, expected):
    """Answers of three actions and of one; the mean weight over processes is 5."""
    config = ObjectiveConfig(loss_type=loss_type, max_completion_length=10)
    rollout = torch.tensor([0, 0, 0, 1])
    value = coefficients(torch.ones(4), rollout, 2, config, torch.tensor(5.0))
    torch.testing.assert_close(value, torch.tensor(expected))


def test_masks_reach_every_scale_that_they_touch():
    mask_HW = torch.zeros(8, 16)
    mask_HW[6, 3] = 1
    weights = propagate_mask(mask_HW, ((1, 2), (2, 4), (4, 8)))
    one, two, four = weights.split([2, 8, 32])
    assert one.tolist() == [1, 0]
    assert two.view(2, 4).nonzero().tolist() == [[1, 0]] and four.view(4, 8).nonzero().tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"loss_type": "dr_grpo"}, "needs model.objective.max_completion_length"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**options)
