"""Runs ablations (configs/ablations) over seeds, and prints tables of means.

    python benchmarks/ablations.py --arms transformer/base transformer/dual_head --seeds 1 2
    python benchmarks/ablations.py                        # all of them; what is there already is not run again

Needs what configs/openmoji makes up to `pretrain_32`: data, semantic encoder, tokenizer, codes and that model. Each run is the
command in the lab note of its config, with the seed and a folder of its own, runs/ablations/ARM/seed_N; an interrupted one goes
on from its last checkpoint. A tokenizer is then tested on held-out pictures; a transformer draws held-out scenes, which are
compared with the ones asked for (`scene_judge.py`). All figures go to metrics.json in that folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from nextflow.benchmarks.scene_judge import SceneJudge, merged

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("runs/ablations")
CONFIGS = Path("configs/ablations")
PIXEL, JOINT, DECODER = (f"configs/openmoji/tokenizer_{stage}.yaml" for stage in ("pixel", "joint", "decoder"))
BASE, CONTINUED, LEVEL_64 = (f"configs/ablations/transformer/{name}.yaml" for name in ("base", "continued", "level_64"))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison: the config configs/ablations/NAME.yaml behind others."""

    name: str
    """tokenizer/... or transformer/..."""
    configs: tuple[str, ...]
    """The configs that its own changes."""
    after: str | None = None
    """The arm whose checkpoint, of the same seed, it needs."""
    takes: str = "model.init_args.init_from"
    """The option that names that checkpoint."""
    draws: bool = True
    """Whether a transformer is judged by what it draws, and not by its held-out loss alone."""

    @property
    def all_configs(self) -> list[str]:
        """Those of its lab note, in order."""
        return list(dict.fromkeys([*self.configs, str(CONFIGS / f"{self.name}.yaml")]))

    def folder(self, seed: int) -> Path:
        """Where its runs are."""
        return OUTPUT / self.name / f"seed_{seed}"


ARMS = {
    arm.name: arm
    for arm in [
        Arm(name="tokenizer/scale_dropout_0", configs=(PIXEL,)),
        Arm(name="tokenizer/scale_dropout_50", configs=(PIXEL,)),
        Arm(name="tokenizer/joint_from_nothing", configs=(JOINT,)),
        Arm(name="tokenizer/joint_from_pixel", configs=(JOINT,), after="tokenizer/scale_dropout_0"),
        Arm(name="tokenizer/decoder_doubled", configs=(DECODER,), after="tokenizer/joint_from_pixel"),
        Arm(name="tokenizer/decoder_same", configs=(DECODER,), after="tokenizer/joint_from_pixel"),
        Arm(name="tokenizer/dual_codebook", configs=(JOINT,)),
        Arm(name="tokenizer/single_codebook", configs=(PIXEL,)),
        *[
            Arm(name=f"transformer/{name}", configs=(BASE,))
            for name in ("base", "dual_head", "positions_grid", "positions_shifted", "last_scale")
        ],
        *[
            Arm(name=f"transformer/{name}", configs=(BASE, CONTINUED))
            for name in ("continued", "self_correction", "accumulated", "accumulated_self_correction", "text_25")
        ],
        Arm(name="transformer/level_64", configs=(BASE, CONTINUED), draws=False),
        Arm(name="transformer/alpha_0", configs=(BASE, CONTINUED, LEVEL_64), draws=False),
        *[
            Arm(
                name=f"transformer/on_{name}", configs=(BASE,), after=f"tokenizer/{name}",
                takes="model.init_args.tokenizer",
            )
            for name in ("dual_codebook", "single_codebook")
        ],
    ]
}  # fmt: skip
COLUMNS = {
    "tokenizer": {
        "PSNR 32": "test/psnr/32",
        "PSNR 64": "test/psnr/64",
        "first 4 of 8 scales": "test/psnr/64/scale_04",
        "first 6": "test/psnr/64/scale_06",
        "SSIM 64": "test/ssim/64",
        "usage": "tokenizer/usage",
        "semantic loss": "train/loss_semantic",
        "CPU minutes": "cpu_minutes",
    },
    "transformer": {
        "val loss, image": "val/loss_image",
        **{f"scale {scale}": f"val/loss_image/scale_{scale:02d}" for scale in (1, 2, 3, 4, 8)},
        "text": "val/loss_text",
        "distance": "held_out/distance",
        "nearer": "held_out/nearer",
        "rank 1": "held_out/rank_1",
        "CPU minutes": "cpu_minutes",
    },
}
NUM_SCENES = 256
"""Held-out scenes that a transformer draws."""


def run(name: str, seed: int) -> None:
    """Fit and measure one arm with one seed, and before it the arm it starts from, unless that was done."""
    arm = ARMS[name]
    folder, options = arm.folder(seed), [word for config in arm.all_configs for word in ("-c", config)]
    if arm.after is not None:
        run(arm.after, seed)
        options.append(f"--{arm.takes}={ARMS[arm.after].folder(seed) / 'last.ckpt'}")
    options += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    options += [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.logger.init_args.version=seed_{seed}"]
    if "fit/steps" not in read(folder):
        resume = ["--ckpt_path=last"] if (folder / "last.ckpt").is_file() else []
        minutes = _call(["fit", *options, *resume], folder / "fit.log")
        _write(folder, {"cpu_minutes": minutes})
    if name.startswith("tokenizer/"):
        if not any(metric.startswith("test/") for metric in read(folder)):
            _call(["test", *options, f"--ckpt_path={folder / 'last.ckpt'}"], folder / "test.log")
    elif arm.draws and "held_out/distance" not in read(folder):
        _write(folder, _judged(arm, seed))
    print(f"{name} seed {seed}: done", flush=True)


def read(folder: Path) -> dict[str, float]:
    """What was measured so far."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table(names: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown: mean and standard deviation over seeds, one table for each kind of model."""
    lines = []
    for family, columns in COLUMNS.items():
        rows = [name for name in names if name.startswith(f"{family}/")]
        if not rows:
            continue
        lines += ["", f"| {family} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        for name in rows:
            runs = [read(ARMS[name].folder(seed)) for seed in seeds]
            cells = [spread([metrics[metric] for metrics in runs if metric in metrics]) for metric in columns.values()]
            lines.append(f"| {name.split('/')[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation` in three or more digits."""
    if not values:
        return "-"
    digits = 0 if abs(mean(values)) >= 1000 else 1 if abs(mean(values)) >= 100 else 3
    return f"{mean(values):,.{digits}f}" + (f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else "")


def _judged(arm: Arm, seed: int) -> dict[str, float]:
    """Pictures of held-out scenes, compared with the scenes themselves."""
    config = merged([ROOT / path for path in arm.all_configs])
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    tokenizer = model["tokenizer"]
    if arm.after is not None and arm.after.startswith("tokenizer/"):
        tokenizer = str(ARMS[arm.after].folder(seed) / "last.ckpt")
    judge = SceneJudge(
        tokenizer=tokenizer, level=data["level"],
        shards={"held_out": "runs/openmoji/data_all/scenes/validation/*.tar"}, schedule=data["schedule"],
        text_tokenizer=data["text_tokenizer"], prompts=NUM_SCENES, samples=1,
    )  # fmt: skip
    folder = arm.folder(seed)
    return judge(folder / "last.ckpt", folder / "scenes.png")


def _write(folder: Path, more: dict[str, float]) -> None:
    (folder / "metrics.json").write_text(json.dumps({**read(folder), **more}, indent=1, sort_keys=True) + "\n")


def _call(arguments: list[str], log: Path) -> float:
    """Run the command line; CPU minutes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = _children_seconds()
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *arguments], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"`python main.py {' '.join(arguments)}` failed: see {log}")
    return (_children_seconds() - begun) / 60


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="seeds of model and data")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.arms:
            run(name, seed)
    print(table(arguments.arms, arguments.seeds))


if __name__ == "__main__":
    main()
