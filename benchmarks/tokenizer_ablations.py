"""Runs the tokenizer's ablation pairs (configs/ablations/tokenizer) over seeds and prints one table of means.

    python benchmarks/tokenizer_ablations.py                # two runs at a time, one thread each
    python benchmarks/tokenizer_ablations.py --seeds 1 2 3  # what is there already is not run again

Needs the data and the semantic encoder of configs/openmoji (data.yaml, contrastive.yaml). Each run is the command in the
lab note of its config, with the seed and a folder of its own, then `test` with the same configs. An interrupted run goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("runs/ablations/tokenizer")


class Arm(NamedTuple):
    """One side of a comparison."""

    name: str
    base: str
    """The config that it changes."""
    after: str | None = None
    """The arm whose checkpoint it starts from."""


PIXEL, JOINT, DECODER = (f"configs/openmoji/tokenizer_{stage}.yaml" for stage in ("pixel", "joint", "decoder"))
ARMS = [
    Arm("scale_dropout_0", PIXEL),
    Arm("scale_dropout_50", PIXEL),
    Arm("joint_from_nothing", JOINT),
    Arm("joint_from_pixel", JOINT, after="scale_dropout_0"),
    Arm("decoder_doubled", DECODER, after="joint_from_pixel"),
    Arm("decoder_same", DECODER, after="joint_from_pixel"),
]
COLUMNS = {
    "PSNR 32": "test/psnr/32",
    "PSNR 64": "test/psnr/64",
    "first 4 of 8 scales": "test/psnr/64/scale_04",
    "first 6": "test/psnr/64/scale_06",
    "SSIM 64": "test/ssim/64",
    "usage": "tokenizer/usage",
    "semantic loss": "train/loss_semantic",
}


def run(arm: Arm, seed: int) -> None:
    """Fit and test one arm with one seed, unless both were done."""
    folder = OUTPUT / arm.name / f"seed_{seed}"
    metrics = _metrics(folder)
    configs = ["-c", arm.base, "-c", f"configs/ablations/tokenizer/{arm.name}.yaml"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    options = [*configs, *quiet, "--seed_everything", str(seed), "--data.seed", str(seed)]
    options += ["--trainer.logger.init_args.version", f"seed_{seed}"]
    if arm.after is not None:
        options += ["--model.init_args.init_from", str(OUTPUT / arm.after / f"seed_{seed}" / "last.ckpt")]
    if "fit/steps" not in metrics:
        resume = ["--ckpt_path", "last"] if (folder / "last.ckpt").is_file() else []
        _call(["fit", *options, *resume], folder / "fit.log")
    if not any(name.startswith("test/") for name in metrics):
        _call(["test", *options, "--ckpt_path", str(folder / "last.ckpt")], folder / "test.log")
    print(f"{arm.name} seed {seed}: PSNR at level 64 {_metrics(folder)['test/psnr/64']:.2f} dB", flush=True)


def table(seeds: list[int]) -> str:
    """Markdown: the mean over seeds of each arm and, behind it, half the range."""
    lines = ["| arm | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for arm in ARMS:
        runs = [_metrics(OUTPUT / arm.name / f"seed_{seed}") for seed in seeds]
        cells = []
        for name in COLUMNS.values():
            values = [metrics[name] for metrics in runs if name in metrics]
            spread = (max(values) - min(values)) / 2 if values else 0.0
            cells.append(f"{mean(values):.2f} ± {spread:.2f}" if values else "-")
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _metrics(folder: Path) -> dict[str, float]:
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _call(arguments: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *arguments], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"`python main.py {' '.join(arguments)}` failed: see {log}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="seeds of model and data")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; each takes one thread")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    waves = [[arm for arm in ARMS if _depth(arm) == depth] for depth in range(3)]
    for wave in waves:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            jobs = [pool.submit(run, arm, seed) for arm in wave for seed in arguments.seeds]
            for job in jobs:
                job.result()
    print(table(arguments.seeds))


def _depth(arm: Arm) -> int:
    """How many arms stand before it."""
    return 0 if arm.after is None else 1 + _depth(next(other for other in ARMS if other.name == arm.after))


if __name__ == "__main__":
    main()
