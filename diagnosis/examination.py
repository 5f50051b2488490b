"""All checks of a run, and the figures that sum it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nextflow.diagnosis.finding import SEVERITIES, Finding, Missing
from nextflow.diagnosis.grpo import GRPO
from nextflow.diagnosis.pretraining import PRETRAINING
from nextflow.diagnosis.run import Kind, TrainingRun
from nextflow.diagnosis.tokenizer import TOKENIZER
from nextflow.diagnosis.training import GENERAL

Check = Callable[[TrainingRun], Iterator[Finding | Missing]]

CHECKS: dict[Kind, tuple[Check, ...]] = {
    "contrastive": GENERAL,
    "tokenizer": (*GENERAL, *TOKENIZER),
    "pretraining": (*GENERAL, *PRETRAINING),
    "grpo": (*GENERAL, *GRPO),
}


class Figure(NamedTuple):
    """A metric that sums a kind of run up."""

    name: str
    better: Literal["lower", "higher", "neither"]
    slack: float
    """What two good runs of the same config may differ by, at least; a reference's ranges are as wide."""
    most: float = math.inf
    """The largest value there can be."""


FIGURES: dict[Kind, tuple[Figure, ...]] = {
    "contrastive": (
        Figure("train/loss", "lower", 0.1),
        Figure("train/accuracy", "higher", 0.08, 1.0),
        Figure("val/image_to_text", "higher", 0.1, 1.0),
        Figure("val/text_to_image", "higher", 0.1, 1.0),
    ),
    "tokenizer": (
        Figure("train/loss_mse", "lower", 0.002),
        Figure("train/loss_semantic", "lower", 0.02),
        Figure("val/psnr", "higher", 0.3),
        Figure("val/ssim", "higher", 0.02, 1.0),
        Figure("tokenizer/usage", "higher", 0.05, 1.0),
        Figure("tokenizer/perplexity", "neither", 20.0),
    ),
    "pretraining": (
        Figure("train/loss_image", "lower", 0.1),
        Figure("train/loss_text", "lower", 0.1),
        Figure("val/loss_image", "lower", 0.2),
        Figure("val/loss_image/scale_01", "lower", 0.5),
        Figure("val/loss_text", "lower", 0.25),
        Figure("train/gradient_norm", "neither", 0.5),
        Figure("train/corrected_codes", "neither", 0.02),
        Figure("throughput/padding", "lower", 0.05),
    ),
    "grpo": (
        Figure("grpo/reward", "higher", 0.03),
        Figure("val/reward", "higher", 0.03),
        Figure("grpo/kl", "lower", 0.03),
        Figure("grpo/entropy", "neither", 0.1),
        Figure("grpo/frac_reward_zero_std", "lower", 0.1),
        Figure("grpo/clip_ratio/region_mean", "lower", 0.05),
    ),
}


@dataclass(frozen=True)
class Examination:
    """What the checks said, worst first."""

    findings: tuple[Finding, ...]
    missing: tuple[Missing, ...]


def examine(run: TrainingRun) -> Examination:
    """Check a run.

    Raises ValueError for a run of something that doctor does not know.
    """
    said = [one for check in CHECKS[run.kind] for one in check(run)]
    findings = sorted((one for one in said if isinstance(one, Finding)), key=lambda one: SEVERITIES.index(one.severity))
    return Examination(tuple(findings), tuple(one for one in said if isinstance(one, Missing)))
