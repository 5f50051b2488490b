"""The arithmetic of GRPO over scales of codes and text ids, as pure functions (NextFlow 3.2.5, equation 5; VAR-RL, 2601.02256).

    A_i    = (R_i - mean of the group) / (std of the group + 1e-4)
    rho_n  = exp(logprob_n - old_n)
    loss   = sum over actions n of c_n * ( -min(rho_n A, clip(rho_n, 1 - epsilon, 1 + epsilon_high) A) + beta * k3_n )
    k3_n   = exp(ref_n - logprob_n) - (ref_n - logprob_n) - 1

An action is a code or a text id that was drawn. c_n holds the weight k_t of its scale, 1 / (h_t w_t)^alpha, zero where nothing
is trained, and the normaliser of `loss_type`. The loss is a sum over actions, so micro-batches add up to the batch exactly.

Options have the names and the meaning that they have in TRL's GRPOConfig; `importance_sampling_level` knows one level more.

Shapes: N roll-outs, P groups, G roll-outs of a group, T actions of some roll-outs behind each other, K completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.sequence.scales import Grid

_STD_FLOOR = 1e-4  # TRL's


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How rewards become a loss. The defaults are TRL's, but for `loss_type` and what text alone does not have."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of their group, of the whole batch, or nothing."""
    epsilon: float = 0.2
    """The ratio is clipped at 1 - epsilon."""
    epsilon_high: float | None = None
    """The ratio is clipped at 1 + epsilon_high; null takes `epsilon`."""
    beta: float = 0.0
    """Weight of the KL divergence to the frozen reference, estimated as k3; 0 keeps no reference."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "grpo"
    """Weighted mean over the actions of each roll-out, then over roll-outs, as in the paper (grpo); over all actions of
    a process (bnpo) or of all processes (dapo); or the sum over actions divided by `max_completion_length` (dr_grpo)."""
    max_completion_length: int | None = None
    """Divisor of "dr_grpo": the most actions that a roll-out can have."""
    importance_sampling_level: Literal["token", "scale", "sequence"] = "token"
    """What one ratio is of: an action; a whole scale, the product over its cells, as the paper writes (a text id is a step of
    its own); or a roll-out, the geometric mean over its actions (GSPO)."""
    alpha: float = 0.7
    """k_t = 1 / (h_t w_t)^alpha: how far large scales are held back (VAR-RL: 0.6 to 0.8 are best)."""

    def __post_init__(self) -> None:
        if self.epsilon < 0 or (self.epsilon_high or 0.0) < 0:
            raise ValueError("model.objective.epsilon and epsilon_high must be at least 0")
        if self.beta < 0:
            raise ValueError(f"model.objective.beta must be at least 0, not {self.beta}")
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("model.objective.loss_type dr_grpo needs model.objective.max_completion_length")


class Advantages(NamedTuple):
    """Advantages, and what is logged of the rewards they come from."""

    advantage_N: Tensor
    mean_P: Tensor
    """Mean reward of each group."""
    std_P: Tensor
    """Standard deviation of each group."""

    @property
    def frac_reward_zero_std(self) -> Tensor:
        """Share of groups whose roll-outs all have the same reward: they teach nothing."""
        return (self.std_P < 1e-6).float().mean()


def group_advantages(reward_N: Tensor, num_generations: int, scale_rewards: str = "group") -> Advantages:
    """Rewards of groups behind each other, less the mean of their group, over a standard deviation.

    Args:
        reward_N: of all processes, so that the batch's deviation is that of the batch.
        num_generations: G; N is a multiple of it.
        scale_rewards: as in `ObjectiveConfig`.
    """
    reward_PG = reward_N.float().view(-1, num_generations)
    mean_P = reward_PG.mean(dim=1)
    std_P = reward_PG.std(dim=1) if num_generations > 1 else torch.zeros_like(mean_P)
    advantage_PG = reward_PG - mean_P[:, None]
    if scale_rewards == "group":
        advantage_PG = advantage_PG / (std_P[:, None] + _STD_FLOOR)
    elif scale_rewards == "batch":
        advantage_PG = advantage_PG / (reward_PG.std() + _STD_FLOOR)
    return Advantages(advantage_PG.flatten(), mean_P, std_P)


def middle_return(reward_NK: Tensor, eta: float = 1.0) -> Tensor:
    """Value [N] of a prefix from K completions of it: eta * log((1/K) * sum_k exp(R_k / eta)) (VAR-RL, equation 10)."""
    return eta * (torch.logsumexp(reward_NK.float() / eta, dim=1) - torch.tensor(float(reward_NK.shape[1])).log())


class Actions(NamedTuple):
    """What the loss needs to know about the actions of some roll-outs, besides their probabilities."""

    rollout_T: Tensor
    """int64, roll-out of each action, counted over the whole batch."""
    step_T: Tensor
    """int64, the step that the action belongs to, no two roll-outs sharing one: a text id, or all cells of one scale."""
    scale_T: Tensor
    """int64, scale of a code, from 1; 0 for text ids."""
    coefficient_T: Tensor
    """float32, c_n."""


class PolicyLoss(NamedTuple):
    """The loss of some actions and, detached, what is logged of it."""

    total: Tensor
    ratio_T: Tensor
    low_T: Tensor
    """bool, the ratio is below 1 - epsilon and the advantage negative: no gradient."""
    high_T: Tensor
    """bool, the ratio is above 1 + epsilon_high and the advantage positive: no gradient."""
    kl_T: Tensor
    """k3; zeros without a reference."""


def policy_loss(
    logprob_T: Tensor,
    old_T: Tensor,
    reference_T: Tensor | None,
    advantage_N: Tensor,
    actions: Actions,
    config: ObjectiveConfig,
) -> PolicyLoss:
    """The loss of some actions; gradients flow through `logprob_T`.

    Args:
        logprob_T: under the policy being trained.
        old_T: under the policy before the first inner step.
        reference_T: under the frozen reference; None where beta is 0.
        advantage_N: of all roll-outs of the batch.
        actions: which roll-out, step and weight each action has. All actions of a step (level "scale") and of a roll-out (level
            "sequence") must be among them.
        config: levels and clipping.
    """
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    log_ratio_T = logprob_T - old_T
    if config.importance_sampling_level == "scale":
        log_ratio_T = _spread_sum(log_ratio_T, actions.step_T)
    elif config.importance_sampling_level == "sequence":
        counts_T = _spread_sum(torch.ones_like(log_ratio_T), actions.rollout_T)
        log_ratio_T = _spread_sum(log_ratio_T, actions.rollout_T) / counts_T
    ratio_T = log_ratio_T.exp()
    advantage_T = advantage_N[actions.rollout_T]
    clipped_T = ratio_T.clamp(1 - config.epsilon, 1 + high)
    per_action_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    kl_T = torch.zeros_like(logprob_T)
    if reference_T is not None:
        kl_T = k3(logprob_T, reference_T)
        per_action_T = per_action_T + config.beta * kl_T
    ratio_T = ratio_T.detach()
    return PolicyLoss(
        (actions.coefficient_T * per_action_T).sum(),
        ratio_T,
        (ratio_T < 1 - config.epsilon) & (advantage_T < 0),
        (ratio_T > 1 + high) & (advantage_T > 0),
        kl_T.detach(),
    )


def k3(logprob_T: Tensor, reference_T: Tensor) -> Tensor:
    """Unbiased, never negative estimate of KL(policy || reference) from samples of the policy."""
    difference_T = reference_T - logprob_T
    return difference_T.exp() - difference_T - 1


def scale_weights(scale_T: Tensor, step_T: Tensor, rollout_T: Tensor, mask_T: Tensor, alpha: float, per_step: bool):
    """Weight of each action, k_t before normalisation: codes 1 / (cells of their scale)^alpha, rescaled to a mean of 1 over the
    trained codes of their roll-out; text ids 1; zero where `mask_T` is. Float32 [T].

    Args:
        scale_T, step_T, rollout_T: as in `Actions`.
        mask_T: bool or share in [0, 1], what is trained.
        alpha: exponent.
        per_step: a scale counts once and not once per cell, as its cells share one ratio (level "scale").
    """
    mask_T = mask_T.float()
    is_code_T = (scale_T > 0).float()
    cells_T = _spread_sum(torch.ones_like(mask_T), step_T)
    weight_T = mask_T * cells_T**-alpha
    if per_step:
        weight_T = weight_T / _spread_sum(mask_T, step_T).clamp(min=1e-9)
        return torch.where(scale_T > 0, weight_T, mask_T)
    trained_T, raw_T = (_spread_sum(values_T, rollout_T) for values_T in (mask_T * is_code_T, weight_T * is_code_T))
    return torch.where(scale_T > 0, weight_T * trained_T / raw_T.clamp(min=1e-9), mask_T)


def coefficients(
    weight_T: Tensor, rollout_T: Tensor, num_rollouts: int, config: ObjectiveConfig, total_weight: Tensor
) -> Tensor:
    """c_n: weights over the normaliser of `loss_type`.

    Args:
        weight_T: of all actions of this process, from `scale_weights`.
        rollout_T: their roll-outs.
        num_rollouts: of this process.
        config: the loss type.
        total_weight: sum of weights over all processes divided by their number ("dapo").
    """
    if config.loss_type == "grpo":
        return weight_T / _spread_sum(weight_T, rollout_T).clamp(min=1e-9) / num_rollouts
    if config.loss_type == "bnpo":
        return weight_T / weight_T.sum().clamp(min=1e-9)
    if config.loss_type == "dapo":
        return weight_T / total_weight.clamp(min=1e-9)
    assert config.max_completion_length is not None
    return weight_T / (num_rollouts * config.max_completion_length)


def propagate_mask(mask_HW: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Which codes of an image take part in what the reward looked at: float32 [codes], from fine to coarse (VAR-RL 9.3).

    The paper gives no formula; here a cell of any scale takes part if one of its pixels does.
    """
    mask_1HW = mask_HW.float()[None]
    return torch.cat([F.adaptive_max_pool2d(mask_1HW, grid).flatten() for grid in grids])


def _spread_sum(value_T: Tensor, index_T: Tensor) -> Tensor:
    """The sum of the values of each index, at every place that has it; differentiable."""
    if not index_T.numel():
        return value_T
    _, dense_T = index_T.unique(return_inverse=True)
    sums = value_T.new_zeros(int(dense_T.max()) + 1).index_add(0, dense_T, value_T)
    return sums[dense_T]
