"""Several rewards as one: a weighted sum, where those that do not apply count as 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextflow.rewards.reward import Reward


class Scores(NamedTuple):
    """Scores of N pictures."""

    total_N: Tensor
    """float32, the weighted sum."""
    by_name: dict[str, Tensor]
    """float32 [N] of each reward, NaN where it does not apply."""


class RewardMixture:
    """Rewards by name, with weights."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None) -> None:
        """
        Args:
            rewards: name to reward; the names are those of the logs.
            weights: name to weight; 1 where not given.

        Raises:
            ValueError: no reward, or weights of unknown names.
        """
        if not rewards:
            raise ValueError("model.rewards is empty: name at least one reward")
        unknown = set(weights or ()) - set(rewards)
        if unknown:
            raise ValueError(f"model.reward_weights names {sorted(unknown)}; model.rewards has {sorted(rewards)}")
        self.rewards = dict(rewards)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in rewards}

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """Score pictures with every reward.

        Raises:
            ValueError: a reward returned another number of scores, or a prompt has no reward that applies.
        """
        by_name = {}
        for name, reward in self.rewards.items():
            score_N = torch.as_tensor(reward(images, prompts, metadata), dtype=torch.float32).cpu()
            if score_N.shape != (len(images),):
                raise ValueError(
                    f"model.rewards.{name} returned scores of shape {tuple(score_N.shape)} for {len(images)} pictures"
                )
            by_name[name] = score_N
        score_RN = torch.stack(list(by_name.values()))
        nothing = score_RN.isnan().all(dim=0).nonzero().flatten().tolist()
        if nothing:
            raise ValueError(
                f"none of model.rewards ({', '.join(self.rewards)}) applies to the prompt {prompts[nothing[0]]!r}: "
                "add one that does, or leave such prompts out of the data"
            )
        weight_R1 = torch.tensor(list(self.weights.values()))[:, None]
        return Scores((score_RN * weight_R1).nansum(dim=0), by_name)

    def masks(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Tensor | None]:
        """Where the scores of each picture come from: the union over rewards; None for everywhere."""
        unions: list[Tensor | None] = []
        for of_picture in zip(*(reward.masks(images, prompts, metadata) for reward in self.rewards.values())):
            given = [mask for mask in of_picture if mask is not None]
            unions.append(torch.stack(given).any(dim=0) if given else None)
        return unions
