"""How many scales should GRPO train? Reward, KL and an independent judge for a small prefix, half of the scales, and all.

    python benchmarks/grpo_prefix.py --output runs/grpo_prefix --steps 30

Every cell of prefix x seed is one run of `--config` (composed scenes; right drawings, number and places are rewarded). Cells
that are done are kept, interrupted ones are resumed, so the command can be given again until the table is full;
`--limit_minutes` ends it between two cells. Before and after, `--samples` pictures are drawn for each of `--prompts` held-out
scenes (the compositional split) and of as many training scenes, at temperature 1 without guidance:

    reward      what was trained on, and each of its parts
    rank_1, 5   the judge, no part of the reward: the share of pictures whose scene is the nearest of all of the split, by
                mean squared difference of pixels (64 x 64), or among the five nearest
    distance    that difference itself, between a picture and the scene that it should show
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn import functional as F

from nextflow.datamodules.prompts import PromptDataModule
from nextflow.evaluation.curves import read_run
from nextflow.evaluation.pictures import Cell, draw_sheet
from nextflow.evaluation.retrieval import squared_distances
from nextflow.generation.engine import generate
from nextflow.generation.requests import GenerationRequest
from nextflow.lightning_modules.tokenizer import load_tokenizer
from nextflow.lightning_modules.transformer_checkpoint import load_transformer
from nextflow.rewards.mixture import RewardMixture
from nextflow.rewards.scene import SceneReward
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.scales import ScaleSchedule

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
    judge = Judge(_merged(given.config), given.prompts, given.samples)
    before = _kept(output / "before.json", lambda: judge(judge.start, output / "before.png"))
    rows = []
    for prefix, seed in cells:
        folder = output / f"prefix_{prefix}_seed_{seed}"
        if not (folder / "result.json").is_file() and time.monotonic() - started > 60 * given.limit_minutes:
            print(f"out of time before prefix {prefix}, seed {seed}: give the command again")
            break
        result = _kept(folder / "result.json", partial(_cell, folder, prefix, seed, given, judge))
        rows.append({"prefix": prefix, "seed": seed, **result})
    _print(before, rows)


def _cell(folder: Path, prefix: int, seed: int, given: argparse.Namespace, judge: Judge) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    overlay = folder / "overlay.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: nextflow.callbacks.last_checkpoint.LastCheckpoint\n"
        f"      init_args: {{dirpath: {folder}/grpo, every_n_train_steps: 10}}\n"
        "    - class_path: nextflow.callbacks.rollout_pictures.RolloutPictures\n"
        f"      init_args: {{every_n_steps: {max(1, given.steps // 2)}, output: {folder}/pictures}}\n"
    )
    last = folder / "grpo" / "last.ckpt"
    command = [
        sys.executable, str(ROOT / "main.py"), "fit",
        *(word for config in [*given.config, overlay] for word in ("-c", str(config))),
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


class Judge:
    """Draws pictures of scenes with a checkpoint and measures them."""

    def __init__(self, config: dict, prompts: int, samples: int) -> None:
        model, data = config["model"]["init_args"], config["data"]["init_args"]
        self.start, self.level, self.samples = model["initialize_from"], data["level"], samples
        self.splits = {
            name: _prompts(data, split, prompts)
            for name, split in (("held_out", data["splits"][0]), ("trained", "train"))
        }
        self.tokenizer = load_tokenizer(model["tokenizer"])
        rewards = {name: SceneReward(**reward["init_args"]) for name, reward in model["rewards"].items()}
        self.rewards = RewardMixture(rewards, model["reward_weights"])

    def __call__(self, checkpoint: str | Path, sheet: Path) -> dict[str, float]:
        loaded = load_transformer(checkpoint)
        values, rows = {}, []
        for split, prompts in self.splits.items():
            chosen = [prompt for prompt in prompts for _ in range(self.samples)]
            requests = [
                GenerationRequest(
                    segments=tuple(segment for segment in prompt.segments if isinstance(segment, TextSegment)),
                    grids=loaded.schedule.grids(self.level, prompt.aspect_ratio),
                    seed=number,
                )
                for number, prompt in enumerate(chosen)
            ]
            with torch.autocast("cpu", torch.bfloat16):
                results = generate(loaded.transformer, requests, layout=loaded.layout, tokenizer=self.tokenizer)
            pictures = [result.image.permute(2, 0, 1).contiguous() for result in results if result.image is not None]
            scores = self.rewards(pictures, [prompt.text for prompt in chosen], [prompt.metadata for prompt in chosen])
            gallery = np.stack([_pixels(prompt.reference) for prompt in prompts])
            distance_PG = squared_distances(np.stack([_pixels(picture) for picture in pictures]), gallery)
            answer = np.arange(len(chosen)) // self.samples
            right = distance_PG[np.arange(len(chosen)), answer]
            rank = (distance_PG < right[:, None]).sum(axis=1) + 1
            values[f"{split}/reward"] = float(scores.total_N.nanmean())
            values |= {f"{split}/{name}": float(score_N.nanmean()) for name, score_N in scores.by_name.items()}
            values |= {f"{split}/rank_{place}": float((rank <= place).mean()) for place in (1, 5)}
            values[f"{split}/distance"] = float(right.mean())
            cells = [Cell(_pixels(picture), prompt.text) for picture, prompt in zip(pictures, chosen)]
            rows += [cells[start : start + 8] for start in range(0, min(24, len(cells)), 8)]
        draw_sheet(rows, side=96).save(sheet)
        return values


def _merged(paths: list[str]) -> dict:
    """Several configs as one, as the command line merges them: mappings are joined, all else is replaced."""

    def joined(old: dict, new: dict) -> dict:
        both = {
            key: joined(old[key], new[key])
            for key in new
            if isinstance(old.get(key), dict) and isinstance(new[key], dict)
        }
        return {**old, **new, **both}

    return reduce(joined, (yaml.safe_load(Path(path).read_text()) for path in paths))


def _prompts(data: dict, split: str, number: int) -> list:
    options = {**data, "splits": [split], "per_split": number, "train_split": split, "seed": 0}
    module = PromptDataModule(**{**options, "schedule": ScaleSchedule(**data["schedule"])})
    return [prompt for batch in module.predict_dataloader() for prompt in batch.prompts]


def _pixels(picture_3HW: torch.Tensor) -> np.ndarray:
    """uint8 [64, 64, 3]: scenes of all shapes are compared as squares."""
    square_13HW = F.interpolate(picture_3HW[None].float(), size=(64, 64), mode="bilinear", antialias=True)
    return square_13HW[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


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
