"""How many scales should GRPO train? Reward, KL and an independent judge for a small prefix, half of the scales, and all.

    python benchmarks/grpo_prefix.py --output runs/grpo_prefix --steps 30

Every cell of prefix x seed is one run of `--config` (composed scenes; right drawings, number and places are rewarded). Cells
that are done are kept, interrupted ones are resumed, so the command can be given again until the table is full;
`--limit_minutes` ends it between two cells. Before and after, `--samples` pictures are drawn for each of `--prompts` held-out
scenes (the compositional split) and of as many training scenes, at temperature 1 without
guidance; what is measured of them says `scene_judge.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from nextflow.benchmarks.scene_judge import SceneJudge, merged
from nextflow.evaluation.curves import read_run

ROOT = Path(__file__).resolve().parents[1]
CURVES = ("grpo/reward", "grpo/kl", "grpo/entropy", "grpo/grad_norm", "val/reward")


def main() -> None:
    """Fill the table as far as the time goes, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", nargs="+", default=[str(ROOT / "configs/openmoji/grpo.yaml")], help="later ones win"
    )
    parser.add_argument("--output", default="runs/grpo_prefix")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--limit_minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    started, output = time.monotonic(), Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    cells = [(prefix, seed) for seed in given.seeds for prefix in given.prefixes]
    judge, start = _judge(given)
    before = _kept(output / "before.json", lambda: judge(start, output / "before.png"))
    rows = []
    for prefix, seed in cells:
        folder = output / f"prefix_{prefix}_seed_{seed}"
        if not (folder / "result.json").is_file() and time.monotonic() - started > 60 * given.limit_minutes:
            print(f"out of time before prefix {prefix}, seed {seed}: give the command again")
            break
        result = _kept(folder / "result.json", partial(_cell, folder, prefix, seed, given, judge))
        rows.append({"prefix": prefix, "seed": seed, **result})
    _print(before, rows)
    _draw(rows, output / "curves.png")


def _cell(folder: Path, prefix: int, seed: int, given: argparse.Namespace, judge: SceneJudge) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "grpo" / "last.ckpt"
    command = [
        sys.executable, str(ROOT / "main.py"), "fit",
        *(word for config in given.config for word in ("-c", str(config))),
        f"--trainer.max_steps={given.steps}", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
        f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.name=grpo",
        f"--seed_everything={seed}", f"--data.seed={100_000 * seed}",
        f"--model.rollouts.prefix_scales={prefix}", *([f"--ckpt_path={last}"] if last.exists() else []),
    ]  # fmt: skip
    begun = _children_seconds()
    subprocess.run(command, check=True)
    seconds = _children_seconds() - begun
    curves = read_run(folder / "grpo", CURVES).curves
    return {"cpu_minutes": seconds / 60, "curves": curves, **judge(last, folder / "after.png")}


def _judge(given: argparse.Namespace) -> tuple[SceneJudge, str]:
    """Who measures the pictures, and the checkpoint that all runs start from."""
    config = merged(given.config)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    judge = SceneJudge(
        shards={"held_out": data["shards"][data["splits"][0]], "trained": data["shards"]["train"]},
        rewards=model["rewards"], reward_weights=model["reward_weights"], tokenizer=model["tokenizer"],
        text_tokenizer=data["text_tokenizer"], schedule=data["schedule"], level=data["level"],
        prompts=given.prompts, samples=given.samples,
    )  # fmt: skip
    return judge, model["initialize_from"]


def _print(before: dict, rows: list[dict]) -> None:
    names = [name for name in before if "/" in name]
    print("| scales trained | seed | KL at the end | " + " | ".join(names) + " | CPU minutes |")
    print("| --- " * (len(names) + 4) + "|")
    print("| before | - | 0 | " + " | ".join(f"{before[name]:.3f}" for name in names) + " | - |")
    for row in rows:
        kl = row["curves"]["grpo/kl"][-1][1]
        shown = " | ".join(f"{row[name]:.3f}" for name in names)
        print(f"| {row['prefix']} | {row['seed']} | {kl:.4f} | {shown} | {row['cpu_minutes']:.1f} |")
    for prefix in sorted({row["prefix"] for row in rows}):
        same = [row for row in rows if row["prefix"] == prefix]
        spread = [
            f"{np.mean([row[n] for row in same]):.3f} ± {np.ptp([row[n] for row in same]) / 2:.3f}" for n in names
        ]
        kl = np.mean([row["curves"]["grpo/kl"][-1][1] for row in same])
        print(f"| {prefix} | mean of {len(same)} ± half the range | {kl:.4f} | " + " | ".join(spread) + " | |")


def _draw(rows: list[dict], path: Path) -> None:
    """Reward, KL and entropy over steps: a line per seed, and the mean of each prefix, smoothed over five steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=100, layout="constrained")
    shown = {"grpo/reward": "reward of roll-outs", "grpo/kl": "KL to the start, per action", "grpo/entropy": "entropy"}
    prefixes = sorted({row["prefix"] for row in rows})
    for axes, (name, label) in zip(figure.subplots(1, 3), shown.items()):
        for number, prefix in enumerate(prefixes):
            curves = [
                np.convolve([value for _, value in row["curves"][name]], np.ones(5) / 5, mode="valid")
                for row in rows
                if row["prefix"] == prefix
            ]
            for curve in curves:
                axes.plot(curve, color=f"C{number}", alpha=0.35, linewidth=0.8)
            shortest = min(map(len, curves))
            mean = np.mean([curve[:shortest] for curve in curves], axis=0)
            axes.plot(mean, color=f"C{number}", linewidth=2, label=f"first {prefix} scales")
        axes.set_xlabel("steps (mean of five)")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path)


def _kept(path: Path, make: Callable[[], dict]) -> dict:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=1))
    return json.loads(path.read_text())


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
