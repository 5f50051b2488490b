"""Runs the transformer's ablations (configs/ablations/transformer) over seeds and prints one table of means.

    python benchmarks/transformer_ablations.py                       # one run at a time, one thread
    python benchmarks/transformer_ablations.py --arms base alpha_0   # what is there already is not run again

Needs the data, the tokenizer and the codes of configs/openmoji (docs/results.md). Each run is the command in the lab note of
its config with a seed and a folder of its own; then the captions of 200 training drawings are answered, and the pictures are
looked for among all drawings. An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import yaml

from nextflow.evaluation.drawings import load_drawings, read_picture
from nextflow.evaluation.retrieval import retrieve

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = Path("configs/ablations/transformer")
OUTPUT = Path("runs/ablations/transformer")
DATA = Path("runs/openmoji/data_all")
ARMS = [
    "base", "accumulated", "positions_grid", "positions_shifted", "dual_head", "last_scale", "alpha_0", "self_correction",
    "accumulated_self_correction",
]  # fmt: skip
COLUMNS = {
    "val loss, image": "val/loss_image",
    "scale 1": "val/loss_image/scale_01",
    "scale 4": "val/loss_image/scale_04",
    "scale 8": "val/loss_image/scale_08",
    "text": "val/loss_text",
    "found at rank 1, %": "rank_1",
    "rank 5, %": "rank_5",
    "minutes": "minutes",
}


def run(arm: str, seed: int) -> None:
    """Fit one arm with one seed, answer captions and score the pictures, unless that was done."""
    folder = OUTPUT / arm / f"seed_{seed}"
    metrics = _metrics(folder)
    overlay = [] if arm == "base" else ["-c", str(CONFIGS / f"{arm}.yaml")]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    if "fit/steps" not in metrics:
        options = ["-c", str(CONFIGS / "base.yaml"), *overlay, *quiet, "--seed_everything", str(seed)]
        options += ["--data.seed", str(seed), "--trainer.logger.init_args.version", f"seed_{seed}"]
        resume = ["--ckpt_path", "last"] if (folder / "last.ckpt").is_file() else []
        _call(["fit", *options, *resume], folder / "fit.log")
        metrics = _metrics(folder)
    if "rank_1" not in metrics:
        # The arm's model with the data of configs/openmoji/generate.yaml.
        model = {"model": yaml.safe_load((CONFIGS / f"{arm}.yaml").read_text()).get("model", {})}
        (folder / "model.yaml").write_text(yaml.safe_dump(model))
        options = ["-c", "configs/openmoji/generate.yaml", "-c", str(folder / "model.yaml"), *quiet]
        options += ["--ckpt_path", str(folder / "last.ckpt"), "--data.per_split", "200"]
        options += ["--data.shards", json.dumps({"train": f"{DATA}/train/*.tar"})]
        options += ["--trainer.callbacks", "nextflow.callbacks.writers.ImageWriter"]
        options += ["--trainer.callbacks.output", str(folder / "generate")]
        _call(["predict", *options], folder / "predict.log")
        metrics |= {"minutes": metrics["fit/seconds"] / 60, **_score(folder / "generate")}
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(f"{arm} seed {seed}: {metrics['rank_1']:.1f} % at rank 1", flush=True)


def table(arms: list[str], seeds: list[int]) -> str:
    """Markdown: the mean over seeds of each arm and, behind it, half the range."""
    lines = ["| arm | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for arm in arms:
        runs = [_metrics(OUTPUT / arm / f"seed_{seed}") for seed in seeds]
        cells = []
        for name in COLUMNS.values():
            values = [metrics[name] for metrics in runs if name in metrics]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}" if values else "-")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _score(folder: Path) -> dict[str, float]:
    """Percentages of the pictures in a folder of ImageWriter whose drawing is the nearest, or among the 5 nearest."""
    gallery = load_drawings(DATA)
    place = {drawing.key: index for index, drawing in enumerate(gallery)}
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = retrieve(
        [read_picture(folder / sample["file"]) for sample in samples],
        [[place[sample["key"]]] for sample in samples],
        ["train"] * len(samples),
        [drawing.pixels_HWC for drawing in gallery],
    ).splits["train"]
    return {"rank_1": 100 * found.rank_1.value, "rank_5": 100 * found.rank_5.value}


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
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of model and data")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            run(arm, seed)
    print(table(arguments.arms, arguments.seeds))


if __name__ == "__main__":
    main()
