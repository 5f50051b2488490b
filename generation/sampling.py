"""Sampling of codes and text ids: temperature, top-k, top-p per scale; guidance ramped over scales (NextFlow 2.2, VAR-RL 4.1).

Guidance of scale k (from 0) of K is (1 + t) * conditional - t * unconditional with t = guidance * k / (K - 1), VAR's ramp:
the first scales, which decide the composition, stay near the model's own distribution.

A sample is the inverse of the cumulative distribution at one uniform number per position. The numbers come from a generator of
the request alone, so a sample depends on its seed and not on the batch it is drawn in.

Shapes: M positions, V ids of one kind (codes, or text ids).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How codes and text ids are drawn. A list gives one value per scale; its last value holds for all later scales."""

    temperature: float | list[float] = 1.0
    """Divides the logits of codes, after guidance. Above 0; use `greedy` for the limit 0."""
    top_k: int | list[int] = 0
    """Keep the k most likely codes; 0 keeps all. The VAR-RL paper draws with 2 at 1024 px, with guidance 5."""
    top_p: float | list[float] = 1.0
    """Then keep the fewest codes whose probabilities sum to this share; 1 keeps all."""
    greedy: bool = False
    """Take the most likely code and text id; the other fields have no effect."""
    text_temperature: float = 1.0
    """Temperature of text ids."""
    text_top_k: int = 0
    """top_k of text ids."""
    text_top_p: float = 1.0
    """top_p of text ids."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p"):
            values = getattr(self, name)
            if isinstance(values, Sequence) and not values:
                raise ValueError(f"sampling.{name} is an empty list: give one value, or one per scale")
        for name in ("temperature", "text_temperature"):
            if min(_values(getattr(self, name))) <= 0:
                raise ValueError(f"sampling.{name} must be above 0; set sampling.greedy to take the most likely")
        for name in ("top_k", "text_top_k"):
            if min(_values(getattr(self, name))) < 0:
                raise ValueError(f"sampling.{name} must be at least 0 (0 keeps all)")
        for name in ("top_p", "text_top_p"):
            if not all(0 < value <= 1 for value in _values(getattr(self, name))):
                raise ValueError(f"sampling.{name} must lie in (0, 1] (1 keeps all)")

    def of_scale(self, scale: int) -> Rule:
        """The rule of one scale, counted from 0."""
        return Rule(
            _of_scale(self.temperature, scale),
            int(_of_scale(self.top_k, scale)),
            _of_scale(self.top_p, scale),
            self.greedy,
        )

    def of_text(self) -> Rule:
        """The rule of text ids."""
        return Rule(self.text_temperature, self.text_top_k, self.text_top_p, self.greedy)


class Rule(NamedTuple):
    """What `sample` does to one group of positions."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False


class Sample(NamedTuple):
    """Drawn ids and their log-probability in the distribution they were drawn from (0 when greedy)."""

    index_M: Tensor
    sampled_logprob_M: Tensor


def guidance_scale(guidance: float, scale: int, num_scales: int) -> float:
    """t of `guide` at `scale` (from 0): linear, 0 at the first scale, `guidance` at the last; an only scale gets all of it."""
    return guidance if num_scales == 1 else guidance * scale / (num_scales - 1)


def guide(conditional_MV: Tensor, unconditional_MV: Tensor, t_M: Tensor) -> Tensor:
    """(1 + t) * conditional - t * unconditional, on logits. t_M from `guidance_scale`, one per position."""
    t_M1 = t_M[:, None].to(conditional_MV.dtype)
    return (1 + t_M1) * conditional_MV - t_M1 * unconditional_MV


def draw_noise(generator: torch.Generator, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1), on the generator's device: exactly what `count` positions of one request need."""
    return torch.rand(count, generator=generator, device=generator.device)


def sample(logits_MV: Tensor, noise_M: Tensor, rule: Rule) -> Sample:
    """Draw one id per position.

    Args:
        logits_MV: of the ids that may be drawn, already guided.
        noise_M: uniform numbers in [0, 1), one per position (`draw_noise`).
        rule: temperature, top-k and then top-p of these positions.
    """
    if rule.greedy:
        index_M = logits_MV.argmax(dim=-1)
        return Sample(index_M, torch.zeros_like(noise_M, dtype=torch.float32))
    scaled_MV = logits_MV.float() / rule.temperature
    ids_MV: Tensor | None = None
    if 0 < rule.top_k < scaled_MV.shape[-1]:
        scaled_MV, ids_MV = scaled_MV.topk(rule.top_k, dim=-1)
    elif rule.top_p < 1:
        scaled_MV, ids_MV = scaled_MV.sort(dim=-1, descending=True)
    probability_MV = scaled_MV.softmax(dim=-1)
    if rule.top_p < 1:
        # An id stays while the ids before it have not reached the share: the most likely one always stays.
        before_MV = probability_MV.cumsum(dim=-1) - probability_MV
        probability_MV = probability_MV.masked_fill(before_MV >= rule.top_p, 0.0)
    # float64: a parallel scan in float32 may rise by an ulp at an id of probability 0, which would then be drawn.
    cumulative_MV = probability_MV.cumsum(dim=-1, dtype=torch.float64)
    total_M1 = cumulative_MV[:, -1:]
    # The first id whose cumulative share exceeds the noise; an id of probability 0 never is. Rounding may lift the product to
    # the total, which no id exceeds, hence the step down.
    below_M1 = torch.nextafter(total_M1, torch.zeros_like(total_M1))
    threshold_M1 = (noise_M[:, None].to(total_M1) * total_M1).minimum(below_M1)
    index_M1 = torch.searchsorted(cumulative_MV, threshold_M1, right=True)
    logprob_M = (probability_MV.gather(1, index_M1) / total_M1).float().log().squeeze(1)
    if ids_MV is not None:
        index_M1 = ids_MV.gather(1, index_M1)
    return Sample(index_M1.squeeze(1), logprob_M)


def _values(value: float | Sequence[float]) -> list[float]:
    return list(value) if isinstance(value, Sequence) else [value]


def _of_scale(value: float | Sequence[float], scale: int) -> float:
    values = _values(value)
    return values[min(scale, len(values) - 1)]
