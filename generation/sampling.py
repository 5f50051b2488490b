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

Guidance = float | tuple[float, ...]
"""t of the last scale, or t of each scale (`guidance_scale`)."""

CHUNK = 128
"""Ids that the draw of an id first takes together."""


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


def guidance_scale(guidance: Guidance, scale: int, num_scales: int) -> float:
    """t of `guide` at `scale` (from 0). A number rises linearly from 0 at the first scale to itself at the last; an only scale
    gets all of it. A tuple holds t of each scale, and its last value for all later ones."""
    if isinstance(guidance, tuple):
        return float(_of_scale(guidance, scale))
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
        logits_MV: of the ids that may be drawn, already guided; -inf where one may not.
        noise_M: uniform numbers in [0, 1), one per position (`draw_noise`).
        rule: temperature, top-k and then top-p of these positions.
    """
    if rule.greedy:
        return Sample(logits_MV.argmax(dim=-1), torch.zeros_like(noise_M, dtype=torch.float32))
    scaled_MV = logits_MV.float()
    ids_MV: Tensor | None = None
    if 0 < rule.top_k < scaled_MV.shape[-1]:
        scaled_MV, ids_MV = scaled_MV.topk(rule.top_k, dim=-1)
    elif rule.top_p < 1:
        scaled_MV, ids_MV = scaled_MV.sort(dim=-1, descending=True)
    weight_MV = scaled_MV - scaled_MV.amax(dim=-1, keepdim=True)
    if rule.temperature != 1:
        weight_MV = weight_MV.div_(rule.temperature)
    weight_MV = weight_MV.exp_()
    if rule.top_p < 1:
        # An id stays while the ids before it have not reached the share: the most likely one always stays.
        before_MV = weight_MV.cumsum(dim=-1) - weight_MV
        weight_MV = weight_MV.masked_fill(before_MV >= rule.top_p * weight_MV.sum(dim=-1, keepdim=True), 0.0)
    index_M1, share_M1 = _invert(weight_MV, noise_M)
    if ids_MV is not None:
        index_M1 = ids_MV.gather(1, index_M1)
    return Sample(index_M1.squeeze(1), share_M1.log().squeeze(1))


def _invert(weight_MV: Tensor, noise_M: Tensor) -> tuple[Tensor, Tensor]:
    """The id [M, 1] at which the cumulative share of the weights first exceeds the noise, and its share.

    In two steps, a chunk of ids and then an id of the chunk, so that no cumulative sum over all ids is ever made.
    """
    M, V = weight_MV.shape
    if V % CHUNK:
        weight_MV = torch.nn.functional.pad(weight_MV, (0, -V % CHUNK))
    weight_MCc = weight_MV.view(M, -1, CHUNK)
    # float64: a parallel scan in float32 may rise by an ulp at a weight of 0, which would then be drawn.
    sum_MC = weight_MCc.sum(dim=-1).double()
    total_M1 = sum_MC.sum(dim=-1, keepdim=True)
    target_M1 = noise_M[:, None].double() * total_M1
    chunk_M1, before_M1 = _first_above(sum_MC, target_M1)
    inside_Mc = weight_MCc.gather(1, chunk_M1[..., None].expand(-1, -1, CHUNK)).squeeze(1)
    index_M1, _ = _first_above(inside_Mc.double(), target_M1 - before_M1)
    return chunk_M1 * CHUNK + index_M1, (inside_Mc.gather(1, index_M1) / total_M1).float()


def _first_above(weight_MK: Tensor, target_M1: Tensor) -> tuple[Tensor, Tensor]:
    """The first index at which the cumulative sum exceeds the target, and the sum before it. A weight of 0 never is it."""
    cumulative_MK = weight_MK.cumsum(dim=-1)
    total_M1 = cumulative_MK[:, -1:]
    # Rounding may lift the target to the total, which nothing exceeds, hence the step down.
    target_M1 = target_M1.minimum(torch.nextafter(total_M1, torch.zeros_like(total_M1))).clamp(min=0.0)
    index_M1 = torch.searchsorted(cumulative_MK, target_M1, right=True)
    return index_M1, cumulative_MK.gather(1, index_M1) - weight_MK.gather(1, index_M1)


def _values(value: float | Sequence[float]) -> list[float]:
    return list(value) if isinstance(value, Sequence) else [value]


def _of_scale(value: float | Sequence[float], scale: int) -> float:
    values = _values(value)
    return values[min(scale, len(values) - 1)]
