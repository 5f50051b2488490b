"""How many scales should GRPO train? Reward, KL and an independent judge for a small prefix, half of the scales, and all.

    python benchmarks/grpo_prefix.py --run runs/quickstart --output runs/grpo_prefix --steps 40

Every cell of prefix x seed is one run of configs/quickstart/grpo.yaml. Cells that are done are kept, interrupted ones are
resumed, so the command can be given again until the table is full; `--limit_minutes` ends it between two cells. Before and
after, `--samples` pictures are drawn for each held-out caption (the compositional split) and for as many training captions:

    reward      cosine of the contrastive model: what was trained on
    rank_1, 5   the judge, no part of the reward: the share of pictures whose drawing is the nearest of all drawings, by mean
                squared difference of pixels, or among the five nearest
    distance    that difference itself, between a picture and the drawing of its caption
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
import torch

from nextflow.evaluation.curves import read_run
from nextflow.evaluation.drawings import Drawing, load_drawings
from nextflow.evaluation.pictures import Cell, draw_sheet
from nextflow.evaluation.retrieval import squared_distances
from nextflow.generation.engine import generate
from nextflow.generation.requests import GenerationRequest
from nextflow.lightning_modules.tokenizer import load_tokenizer
from nextflow.lightning_modules.transformer_checkpoint import load_transformer
from nextflow.rewards.contrastive import ContrastiveReward
from nextflow.sequence.documents import TextSegment

ROOT = Path(__file__).resolve().parents[1]
LEVEL = 64


def main() -> None:
    """Fill the table as far as the time goes, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/quickstart", help="folder of a finished quickstart")
    parser.add_argument("--output", default="runs/grpo_prefix")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--limit_minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    started, output = time.monotonic(), Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    cells = [(prefix, seed) for seed in given.seeds for prefix in given.prefixes]
    judge = Judge(Path(given.run), given.samples)
    before = _kept(output / "before.json", lambda: judge(f"{given.run}/transformer/last.ckpt", output / "before.png"))
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
    command = [
        sys.executable, str(ROOT / "main.py"), "fit", "-c", str(ROOT / "configs/quickstart/grpo.yaml"),
        f"--trainer.max_steps={given.steps}", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
        f"--trainer.logger.init_args.save_dir={folder}",
        f"--seed_everything={seed}", f"--data.seed={1000 * seed}", f"--model.rollouts.prefix_scales={prefix}",
    ]  # fmt: skip
    overlay = folder / "overlay.yaml"
    overlay.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: nextflow.callbacks.last_checkpoint.LastCheckpoint\n"
        f"      init_args: {{dirpath: {folder}/grpo, every_n_train_steps: 10}}\n"
        "    - class_path: nextflow.callbacks.rollout_pictures.RolloutPictures\n"
        f"      init_args: {{every_n_steps: {max(1, given.steps // 2)}, output: {folder}/pictures}}\n"
    )
    command[5:5] = ["-c", str(overlay)]
    last = folder / "grpo" / "last.ckpt"
    begun = _children_seconds()
    subprocess.run([*command, *([f"--ckpt_path={last}"] if last.exists() else [])], check=True)
    seconds = _children_seconds() - begun
    names = ("grpo/reward", "grpo/kl", "grpo/entropy", "grpo/grad_norm")
    curves = read_run(folder / "grpo", names).curves
    return {"cpu_minutes": seconds / 60, "curves": curves, **judge(last, folder / "after.png")}


class Judge:
    """Draws pictures of captions with a checkpoint and measures them."""

    def __init__(self, run: Path, samples: int) -> None:
        drawings = load_drawings(run / "data")
        self.gallery = np.stack([drawing.pixels_HWC for drawing in drawings])
        self.answer = {drawing.key: place for place, drawing in enumerate(drawings)}
        held_out = [drawing for drawing in drawings if drawing.split == "compositional"]
        trained = [drawing for drawing in drawings if drawing.split == "train"]
        self.splits: dict[str, list[Drawing]] = {
            "held_out": held_out,
            "trained": trained[:: max(1, len(trained) // len(held_out))][: len(held_out)],
        }
        self.samples = samples
        self.tokenizer = load_tokenizer(run / "tokenizer_decoder/last.ckpt")
        self.reward = ContrastiveReward(str(run / "contrastive/siglip2"), str(run / "data/text_tokenizer"))

    def __call__(self, checkpoint: str | Path, sheet: Path) -> dict[str, float]:
        loaded = load_transformer(checkpoint)
        values, rows = {}, []
        for split, drawings in self.splits.items():
            chosen = [drawing for drawing in drawings for _ in range(self.samples)]
            requests = [
                GenerationRequest(
                    segments=(TextSegment(ids=loaded.text_tokenizer.encode(drawing.caption)),),
                    grids=loaded.schedule.grids(LEVEL),
                    seed=number,
                )
                for number, drawing in enumerate(chosen)
            ]
            results = generate(loaded.transformer, requests, layout=loaded.layout, tokenizer=self.tokenizer)
            pictures = [result.image for result in results if result.image is not None]
            scores = self.reward(
                [image.permute(2, 0, 1).contiguous() for image in pictures],
                [drawing.caption for drawing in chosen],
                [{}] * len(chosen),
            )
            distance_PG = squared_distances(torch.stack(pictures).numpy(), self.gallery)
            right = distance_PG[np.arange(len(chosen)), [self.answer[drawing.key] for drawing in chosen]]
            rank = (distance_PG < right[:, None]).sum(axis=1) + 1
            values |= {
                f"{split}/reward": float(scores.mean()),
                f"{split}/rank_1": float((rank == 1).mean()),
                f"{split}/rank_5": float((rank <= 5).mean()),
                f"{split}/distance": float(right.mean()),
            }
            cells = [Cell(image.numpy(), drawing.caption) for image, drawing in zip(pictures, chosen)]
            rows += [cells[start : start + 8] for start in range(0, min(24, len(cells)), 8)]
        draw_sheet(rows, side=96).save(sheet)
        return values


def _print(before: dict, rows: list[dict]) -> None:
    names = [
        f"{split}/{name}" for split in ("held_out", "trained") for name in ("reward", "rank_1", "rank_5", "distance")
    ]
    print("| scales trained | seed | KL at the end | " + " | ".join(names) + " | CPU minutes |")
    print("| --- " * (len(names) + 4) + "|")
    print("| before | - | 0 | " + " | ".join(f"{before[name]:.3f}" for name in names) + " | - |")
    for row in rows:
        kl = row["curves"]["grpo/kl"][-1][1]
        shown = " | ".join(f"{row[name]:.3f}" for name in names)
        print(f"| {row['prefix']} | {row['seed']} | {kl:.4f} | {shown} | {row['cpu_minutes']:.1f} |")


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
