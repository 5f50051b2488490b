"""The paper's findings in miniature: reruns any of them, and prints one table with verdicts.

    python benchmarks/findings.py                       # all; what is there already is not run again, what was cut off goes on
    python benchmarks/findings.py --only a d --seeds 1 2 3
    python benchmarks/findings.py --table               # runs nothing

Each finding is a claim of the paper about two arms and one measure. An arm is one config of configs/ablations (`ablations.py`),
a prefix of GRPO (`grpo_prefix.py`) or a packing strategy (`packing.py`), run with some seeds at the same budget.

The verdict compares the difference of the means, in the direction that the paper says, with what the spread of the seeds leaves
open. Let g be that difference, s the arms' standard deviation over seeds, pooled, and e = t * s * sqrt(1/n + 1/m), t the 95th
percentile of Student's distribution with n + m - 2 degrees of freedom:

    g > e       holds: had the arms been alike, one of twenty such experiments would show as much
    g < -e      does not hold here: the opposite was seen, by the same measure
    otherwise   too noisy to say

A claim that something does no harm has a tolerance, a fraction of the other arm's mean that counts as none: it is added to g.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Literal

from nextflow.benchmarks import ablations

ROOT = Path(__file__).resolve().parents[1]
Experiment = Literal["ablations", "grpo_prefix", "packing"]
RESULTS: dict[Experiment, str] = {
    "ablations": "runs/ablations/{arm}/seed_{seed}/metrics.json",
    "grpo_prefix": "runs/grpo_prefix/{arm}_seed_{seed}/result.json",
    "packing": "runs/packing/{arm}/seed_{seed}/metrics.json",
}
"""Where each experiment leaves the figures of an arm and a seed."""
T_95 = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)
"""95th percentiles of Student's distribution with 1, 2, ... degrees of freedom; more are taken as the last."""
HOLDS, FAILS, NOISY, MISSING = "holds", "does not hold here", "too noisy to say", "not run"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim of the paper about two arms."""

    letter: str
    """What `--only` names."""
    claim: str
    """In words."""
    source: str
    """Where the paper says it."""
    arms: tuple[str, str]
    """The one that the paper says is better, or does no harm; and the one that it is compared with."""
    measure: str
    """What is compared, in words."""
    metrics: tuple[str, ...]
    """The names of what is compared; the mean of several."""
    better: Literal["lower", "higher"]
    """Which values of it are."""
    tolerance: float = 0.0
    """Fraction of the other arm's mean that counts as no harm."""
    experiment: Experiment = "ablations"
    """What runs the arms."""


NEARER = "share of other scenes that drawn ones are nearer to"
LOW = tuple(f"val/loss_image/scale_{scale:02d}" for scale in (1, 2, 3, 4))
FINDINGS = [
    Finding(
        letter="a", claim="one head for text and codes learns images better than two", source="3.2.1, fig. 9",
        arms=("transformer/base", "transformer/dual_head"),
        measure="held-out image loss", metrics=("val/loss_image",), better="lower",
    ),
    Finding(
        letter="a", claim="and texts as well", source="3.2.1, fig. 9",
        arms=("transformer/base", "transformer/dual_head"),
        measure="held-out caption loss", metrics=("val/loss_text",), better="lower", tolerance=0.01,
    ),
    Finding(
        letter="b", claim="self-correction (60 % of the codes) helps residual features", source="3.2.1, fig. 10",
        arms=("transformer/self_correction", "transformer/continued"),
        measure=NEARER, metrics=("held_out/nearer",), better="lower",
    ),
    Finding(
        letter="b", claim="self-correction (30 %) harms accumulated features", source="3.2.1, fig. 10",
        arms=("transformer/accumulated", "transformer/accumulated_self_correction"),
        measure=NEARER, metrics=("held_out/nearer",), better="lower",
    ),
    Finding(
        letter="c", claim="25 % text does not hurt pictures", source="6.7, table 1",
        arms=("transformer/text_25", "transformer/continued"),
        measure="held-out image loss", metrics=("val/loss_image",), better="lower", tolerance=0.01,
    ),
    Finding(
        letter="d", claim="reweighting (alpha 0.9 against 0) lowers the loss of low scales", source="3.2.3, fig. 11",
        arms=("transformer/level_64", "transformer/alpha_0"),
        measure="held-out loss, scales 1 to 4 of 8", metrics=LOW, better="lower",
    ),
    Finding(
        letter="d", claim="and of the largest scale too", source="3.2.3",
        arms=("transformer/level_64", "transformer/alpha_0"),
        measure="held-out loss, scale 8", metrics=("val/loss_image/scale_08",), better="lower",
    ),
    Finding(
        letter="e", claim="dropping half of the scales improves reconstruction", source="3.1",
        arms=("tokenizer/scale_dropout_50", "tokenizer/scale_dropout_0"),
        measure="PSNR, level 64", metrics=("test/psnr/64",), better="higher",
    ),
    Finding(
        letter="e", claim="and makes the codes robust: pictures from half of the scales", source="3.1",
        arms=("tokenizer/scale_dropout_50", "tokenizer/scale_dropout_0"),
        measure="PSNR after 4 of 8 scales", metrics=("test/psnr/64/scale_04",), better="higher",
    ),
    Finding(
        letter="f", claim="a single codebook reconstructs better than the dual one (by 0.5 dB)", source="3.1, fig. 8",
        arms=("tokenizer/single_codebook", "tokenizer/dual_codebook"),
        measure="PSNR of scenes, level 32", metrics=("test/psnr/32",), better="higher",
    ),
    Finding(
        letter="f", claim="but the dual one generates better", source="3.1, fig. 8",
        arms=("transformer/on_dual_codebook", "transformer/on_single_codebook"),
        measure=NEARER, metrics=("held_out/nearer",), better="lower",
    ),
    Finding(
        letter="g", claim="GRPO of the first scales alone is better than of all", source="3.2.5, fig. 12",
        arms=("prefix_2", "prefix_4"),
        measure="reward of held-out scenes, 2 against 4 scales", metrics=("held_out/reward",), better="higher",
        experiment="grpo_prefix",
    ),
    Finding(
        letter="h", claim="packing to a fixed budget is faster than to a fixed length", source="4, table 3",
        arms=("fixed_budget", "fixed_length"),
        measure="tokens per second and rank, 1,024 ranks", metrics=("tokens_per_second/1024",), better="higher",
        experiment="packing",
    ),
    Finding(
        letter="h", claim="which is faster than padding", source="4, table 3",
        arms=("fixed_length", "padded"),
        measure="tokens per second and rank, 1,024 ranks", metrics=("tokens_per_second/1024",), better="higher",
        experiment="packing",
    ),
]  # fmt: skip


def verdict(
    first: Sequence[float], second: Sequence[float], *, better: Literal["lower", "higher"], tolerance: float = 0.0
) -> str:
    """Whether the first arm's values are better than the second's: the rule at the top of this file.

    Args:
        first: a value for each seed of the arm that is said to be better.
        second: of the other arm.
        better: which values are.
        tolerance: fraction of the second arm's mean by which the first may be worse.
    """
    if not first or not second:
        return MISSING
    freedom = len(first) + len(second) - 2
    if freedom < 1 or min(len(first), len(second)) < 2:
        return NOISY
    gain = (mean(first) - mean(second)) * (1 if better == "higher" else -1) + tolerance * abs(mean(second))
    pooled = sum((len(values) - 1) * variance(values) for values in (first, second)) / freedom
    error = T_95[min(freedom, len(T_95)) - 1] * (pooled * (1 / len(first) + 1 / len(second))) ** 0.5
    return HOLDS if gain > error else FAILS if gain < -error else NOISY


def values_of(finding: Finding, arm: str) -> dict[int, float]:
    """Seed -> value, of all seeds whose figures are stored."""
    pattern = RESULTS[finding.experiment].replace("{arm}", arm)
    found = {}
    for path in Path().glob(pattern.replace("{seed}", "*")):
        stored = json.loads(path.read_text())
        seed = re.fullmatch(re.escape(pattern).replace(re.escape("{seed}"), r"(\d+)"), path.as_posix())
        if seed is not None and all(metric in stored for metric in finding.metrics):
            found[int(seed[1])] = mean(stored[metric] for metric in finding.metrics)
    return dict(sorted(found.items()))


def table(findings: Sequence[Finding]) -> str:
    """Markdown: a line for each finding, from what is stored."""
    lines = ["| | the paper | measure | so | against | seeds | verdict |", "| --- |" + " --- |" * 6]
    for finding in findings:
        first, second = (list(values_of(finding, arm).values()) for arm in finding.arms)
        names = [arm.split("/")[-1] for arm in finding.arms]
        cells = [f"`{name}` {ablations.spread(values)}" for name, values in zip(names, (first, second))]
        said = verdict(first, second, better=finding.better, tolerance=finding.tolerance)
        seeds = f"{len(first)}" if len(first) == len(second) else f"{len(first)}, {len(second)}"
        lines.append(
            f"| {finding.letter} | {finding.claim} ({finding.source}) | {finding.measure} | {cells[0]} | {cells[1]} "
            f"| {seeds} | *{said}* |"
        )
    return "\n".join(lines)


def run(findings: Sequence[Finding], seeds: Sequence[int]) -> None:
    """Run what is missing of their arms, seed by seed."""
    runners: Mapping[Experiment, Callable[[Sequence[str], int], None]] = {
        "ablations": _run_ablations,
        "grpo_prefix": _run_grpo,
        "packing": _run_packing,
    }
    for seed in seeds:
        for experiment, runner in runners.items():
            arms = [arm for finding in findings if finding.experiment == experiment for arm in finding.arms]
            if arms:
                runner(list(dict.fromkeys(arms)), seed)


def _run_ablations(arms: Sequence[str], seed: int) -> None:
    for arm in arms:
        ablations.run(arm, seed)


def _run_grpo(arms: Sequence[str], seed: int) -> None:
    configs = ["configs/openmoji/grpo.yaml", "configs/openmoji/grpo_32.yaml"]
    prefixes = [arm.removeprefix("prefix_") for arm in arms]
    _script("grpo_prefix", "--config", *configs, "--steps", "30", "--prefixes", *prefixes, "--seeds", str(seed))


def _run_packing(arms: Sequence[str], seed: int) -> None:
    if not all(Path(RESULTS["packing"].format(arm=arm, seed=seed)).is_file() for arm in arms):
        _script("packing", "--batches", "4", "--simulated", "400", "--seed", str(seed), "--output", "runs/packing")


def _script(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments], check=True)


def main() -> None:
    """Run what is missing, and print the table."""
    letters = sorted({finding.letter for finding in FINDINGS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=letters, choices=letters, metavar="LETTER", help=", ".join(letters)
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2], help="seeds to run; the table takes all that are stored"
    )
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    arguments = parser.parse_args()
    chosen = [finding for finding in FINDINGS if finding.letter in arguments.only]
    if not arguments.table:
        run(chosen, arguments.seeds)
    print(table(chosen))


if __name__ == "__main__":
    main()
