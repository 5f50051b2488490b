"""Roll-outs of GRPO: which answers a batch of prompts gets, and what of them each update trains.

whole       num_generations answers for each prompt; the first `prefix_scales` scales are trained (prefix tuning, NextFlow
            3.2.5).

`middle_return` (VAR-RL, "value as middle return") splits the horizon behind scale m = `prefix_scales` and trains both parts in
turn:

prefix      each answer is finished `num_completions` times from its scale m, and its return is the middle return of those;
            scales 1..m are trained. `prefix_updates` batches of these,
suffix      then one batch whose answers to a prompt all go on from the same m scales; the scales behind m are trained.

Shapes: N answers, prompts in order and the answers to each behind each other; K completions of one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from nextflow.generation.given import keep_scales
from nextflow.generation.requests import GenerationRequest, GenerationResult

Stage = Literal["whole", "prefix", "suffix"]
Answer = Callable[[Sequence[GenerationRequest]], list[GenerationResult]]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How many answers a prompt gets, and which of their scales are trained."""

    num_generations: int = 8
    """Answers of a group, G."""
    prefix_scales: int | None = None
    """Scales that are trained, m; null trains all. The paper takes 8 of 18."""
    middle_return: bool = False
    """Train the scales up to m and those behind it in turn, each with a return of its own; needs `prefix_scales`."""
    num_completions: int = 2
    """Completions whose middle return is the return of a prefix, K."""
    eta: float = 1.0
    """Temperature of the middle return: small takes the best completion, large the mean."""
    prefix_updates: int = 3
    """Batches that train prefixes for each one that trains suffixes."""
    mask_propagation: bool = False
    """Train only codes under the pixels that the rewards say they looked at (`Reward.masks`)."""

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ValueError("model.rollouts.num_generations must be at least 2: an advantage is relative to its group")
        if self.prefix_scales is not None and self.prefix_scales < 1:
            raise ValueError("model.rollouts.prefix_scales must be at least 1; null trains all scales")
        if self.middle_return and self.prefix_scales is None:
            raise ValueError("model.rollouts.middle_return splits at model.rollouts.prefix_scales: set it")
        if self.num_completions < 1 or self.eta <= 0 or self.prefix_updates < 1:
            raise ValueError("model.rollouts: num_completions and prefix_updates must be positive, eta above 0")

    def stage(self, batch: int) -> Stage:
        """What the batch of this number (from 0) trains."""
        if not self.middle_return:
            return "whole"
        return "suffix" if batch % (self.prefix_updates + 1) == self.prefix_updates else "prefix"

    def trains(self, stage: Stage, scale: int) -> bool:
        """Whether codes of a scale (from 1) are trained; scale 0 are text ids, which stand before the picture."""
        last = self.prefix_scales
        if stage == "suffix":
            return last is not None and scale > last
        return last is None or scale <= last

    @property
    def seeds_of_prompt(self) -> int:
        """Random numbers are drawn with the prompt's seed times this, and on: no two answers of a run share a seed."""
        return self.num_generations * (self.num_completions if self.middle_return else 1)


class Rollouts(NamedTuple):
    """Answers to a batch of prompts."""

    stage: Stage
    results: list[GenerationResult]
    """N answers: what is trained."""
    completions: list[GenerationResult]
    """N * (K - 1) further completions of the prefixes, those of an answer behind each other; else empty."""


def roll_out(requests: Sequence[GenerationRequest], stage: Stage, config: RolloutConfig, answer: Answer) -> Rollouts:
    """Answer every prompt num_generations times.

    Args:
        requests: one for each prompt.
        stage: of this batch.
        config: how many, and where to split.
        answer: the generation engine.

    Raises:
        ValueError: the pictures have no scale behind `prefix_scales` where they are split there.
    """
    group, split = config.num_generations, config.prefix_scales
    if config.middle_return:
        for request in requests:
            if split is None or request.task != "image" or split >= len(request.grids):
                raise ValueError(
                    f"model.rollouts.middle_return splits pictures behind scale {split}; a prompt asks for "
                    f"{request.task!r} with {len(request.grids)} scales: lower prefix_scales, or turn it off"
                )
    assert split is not None or not config.middle_return
    copies = [_seeded(request, config, index) for request in requests for index in range(group)]
    if stage == "whole":
        return Rollouts(stage, answer(copies), [])
    if stage == "suffix":
        first = answer(copies[::group])
        others = [
            _going_on(result, split, copies[place * group + index].seed)
            for place, result in enumerate(first)
            for index in range(1, group)
        ]
        drawn = answer(others)
        groups = zip(first, (drawn[start : start + group - 1] for start in range(0, len(drawn), group - 1)))
        return Rollouts(stage, [result for head, tail in groups for result in (head, *tail)], [])
    results = answer(copies)
    further = [
        _going_on(result, split, result.request.seed + group * k)
        for result in results
        for k in range(1, config.num_completions)
    ]
    return Rollouts(stage, results, answer(further) if further else [])


def _seeded(request: GenerationRequest, config: RolloutConfig, index: int) -> GenerationRequest:
    return replace(request, seed=request.seed * config.seeds_of_prompt + index)


def _going_on(result: GenerationResult, split: Any, seed: int) -> GenerationRequest:
    request = result.request
    return replace(request, seed=seed, given=keep_scales(result.codes, request.grids, split))
