"""What GRPO logs, under TRL's names behind `grpo/`, as means over the actions or roll-outs of all inner steps of a batch."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from nextflow.lightning_modules.grpo_objective import Advantages, PolicyLoss


class RunningMeans:
    """Sums of values and counts, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, values: Tensor) -> None:
        """Take values in; NaN counts as none."""
        values = values.detach().float()
        values = values[~values.isnan()]
        self._sums[name] = self._sums.get(name, torch.zeros((), device=values.device)) + values.sum()
        self._counts[name] += values.numel()

    def values(self) -> dict[str, float]:
        """The means over all processes, of every name that any of them has; names without a value are left out."""
        own = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        ranks: list[dict[str, tuple[float, float]]] = [own]
        if dist.is_available() and dist.is_initialized():
            # Not Lightning's reduction by name: answers of one process may have scales that those of another lack.
            ranks = [own] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        names = sorted({name for rank in ranks for name in rank})
        sums = {name: [sum(rank.get(name, (0.0, 0.0))[side] for rank in ranks) for side in (0, 1)] for name in names}
        return {name: total / count for name, (total, count) in sums.items() if count}


def add_losses(means: RunningMeans, loss: PolicyLoss, entropy_T: Tensor, scale_T: Tensor, has_reference: bool) -> None:
    """`entropy`, `ratio`, `kl`, and shares of actions that the clipping takes out of the gradient, overall and by scale."""
    means.add("grpo/entropy", entropy_T)
    means.add("grpo/ratio", loss.ratio_T)
    if has_reference:
        means.add("grpo/kl", loss.kl_T)
    clipped_T = loss.low_T | loss.high_T
    means.add("grpo/clip_ratio/low_mean", loss.low_T)
    means.add("grpo/clip_ratio/high_mean", loss.high_T)
    means.add("grpo/clip_ratio/region_mean", clipped_T)
    for scale in scale_T.unique().tolist():
        name = f"scale_{scale:02d}" if scale else "text"
        means.add(f"grpo/clip_ratio/{name}", clipped_T[scale_T == scale])
        means.add(f"grpo/entropy/{name}", entropy_T[scale_T == scale])
        if has_reference:
            means.add(f"grpo/kl/{name}", loss.kl_T[scale_T == scale])


def reward_values(advantages: Advantages, by_name: dict[str, Tensor]) -> dict[str, float]:
    """Values of a batch's rewards: `reward` and `reward_std` (of groups, averaged); mean and deviation of each reward."""
    values = {
        "grpo/reward": float(advantages.mean_P.mean()),
        "grpo/reward_std": float(advantages.std_P.mean()),
        "grpo/frac_reward_zero_std": float(advantages.frac_reward_zero_std),
    }
    for name, score_N in by_name.items():
        applies_N = score_N[~score_N.isnan()]
        if len(applies_N):
            values[f"grpo/rewards/{name}/mean"] = float(applies_N.mean())
            values[f"grpo/rewards/{name}/std"] = float(applies_N.std()) if len(applies_N) > 1 else 0.0
    return values
