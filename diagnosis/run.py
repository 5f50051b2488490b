"""What a run leaves in its folder: event files of TensorBoard, `config.yaml`, and `metrics.json` of MetricsWriter.

Nothing of it is needed but the event files. A run that was interrupted and resumed has several: what an earlier one logged
from the step on at which a later one began is what was lost and done again, and does not count. Event files without training
steps (of `validate` and `test`) do not count either.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from nextflow.diagnosis.curve import Curve

Kind = Literal["contrastive", "tokenizer", "pretraining", "grpo"]

SIGNS: dict[Kind, tuple[str, ...]] = {
    "grpo": ("grpo/reward",),
    "pretraining": ("train/loss_image", "train/loss_text"),
    "contrastive": ("train/accuracy", "val/image_to_text"),
    "tokenizer": ("train/loss_mse", "train/loss_l1", "train/loss_perceptual", "val/psnr"),
}
"""Metrics that only this kind of run has; the first kind that has one of its own is it."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run as its folder shows it."""

    folder: Path
    curves: Mapping[str, Curve]
    """By name; steps count from 0, as in TensorBoard."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The merged config, empty where there is none."""
    ended_at: int | None = None
    """Optimiser steps that MetricsWriter counted at the end of training; None if it has not seen one."""
    age: float = float("inf")
    """Seconds since something was logged."""

    @cached_property
    def kind(self) -> Kind:
        """Raises ValueError for a run of something else."""
        for kind, names in SIGNS.items():
            if any(name in self.curves for name in names):
                return kind
        raise ValueError(
            f"{self.folder}: its metrics are of no module that doctor knows ({', '.join(sorted(self.curves)[:8])})"
        )

    @cached_property
    def steps(self) -> int:
        """Optimiser steps done, as far as they were logged."""
        done = 1 + max(int(curve.step_N[-1]) for name, curve in self.curves.items() if not name.startswith("mixture/"))
        done = max(done, self.ended_at or 0)
        return done if self.planned is None else min(done, self.planned)  # a resumed run validates a step late

    @cached_property
    def planned(self) -> int | None:
        """Optimiser steps that the config asks for; None where only the data knows."""
        trainer = self.config.get("trainer") or {}
        ends = [trainer["max_steps"]] if (trainer.get("max_steps") or -1) > 0 else []
        accumulate = trainer.get("accumulate_grad_batches") or 1
        epochs, batches = trainer.get("max_epochs") or -1, self.setting("data.batches_per_epoch")
        stages = (self.callback("ResolutionCurriculum") or {}).get("stages")
        if stages:
            ends.append(sum(-(-stage["num_batches"] // accumulate) for stage in stages))
        elif epochs > 0 and batches:
            ends.append(epochs * -(-batches // accumulate))
        return min(ends) if ends else None

    @cached_property
    def last_stage(self) -> int:
        """First step of the last stage of a curriculum, which changes what losses mean; else 0."""
        stage = self.curves.get("curriculum/stage")
        return 0 if stage is None else int(stage.step_N[np.argmax(stage.value_N == stage.value_N[-1])])

    def curve(self, name: str) -> Curve | None:
        """A metric without NaN and infinities; None where it was not logged, or never finite."""
        curve = self.curves.get(name)
        return None if curve is None or not len(curve.finite) else curve.finite

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config; `model.optimizer.lr` steps over `init_args`. `default` where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get("init_args", value) if isinstance(value, Mapping) and part not in value else value
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return default if value is None else value

    def callback(self, name: str) -> Mapping[str, Any] | None:
        """The arguments of the callback whose class is called `name`; None if the config has none."""
        callbacks = (self.config.get("trainer") or {}).get("callbacks") or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if callback["class_path"].rsplit(".", 1)[-1] == name:
                return callback.get("init_args") or {}
        return None

    @property
    def starts_anew(self) -> bool:
        """Whether it begins with random weights, as far as the config tells."""
        return not any(self.setting(f"model.{key}") for key in ("initialize_from", "init_from", "pretrained"))


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it holds event files of training, else the folders in it, at any depth, that do.

    Raises FileNotFoundError when there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; doctor wants the folder of a run")
    here = [folder] if any(folder.glob("events.out.tfevents.*")) else []
    runs = here or sorted({path.parent for path in folder.rglob("events.out.tfevents.*")})
    if not runs:
        raise FileNotFoundError(
            f"{folder}: it holds no event files of TensorBoard; doctor reads those, so the run needs trainer.logger "
            "lightning.pytorch.loggers.TensorBoardLogger"
        )
    return runs


def read_run(folder: Path) -> TrainingRun | None:
    """The run of a folder; None if nothing was trained there.

    Raises FileNotFoundError without event files.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: (_began(path), path.name))
    if not files:
        raise FileNotFoundError(f"{folder}: it holds no event files of TensorBoard")
    points: dict[str, dict[int, float]] = defaultdict(dict)
    latest, began = 0.0, 0.0
    for path in files:
        scalars = list(_scalars(path))
        trained = [scalar.step for scalar in scalars if scalar.name.startswith(("train/", "grpo/"))]
        if not trained:
            continue
        began = _began(path)
        for values in points.values():
            for step in [step for step in values if step >= min(trained)]:
                del values[step]
        for scalar in scalars:
            points[scalar.name][scalar.step] = scalar.value
            latest = max(latest, scalar.time)
    curves = {name: _curve(name, values) for name, values in points.items() if values and name not in IGNORED}
    if not curves:
        return None
    config, metrics = folder / "config.yaml", folder / "metrics.json"
    # An older file is that of a run before this one.
    written = json.loads(metrics.read_text()) if metrics.is_file() and metrics.stat().st_mtime > began else {}
    ended_at = written.get("fit/steps")
    return TrainingRun(
        folder=folder,
        curves=curves,
        config=yaml.safe_load(config.read_text()) if config.is_file() else {},
        ended_at=None if ended_at is None else int(ended_at),
        age=time.time() - latest,
    )


IGNORED = ("epoch", "hp_metric")


@dataclass(frozen=True)
class _Scalar:
    name: str
    step: int
    value: float
    time: float


def _scalars(path: Path) -> Iterator[_Scalar]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # a second to import

    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield _Scalar(value.tag, event.step, value.simple_value, event.wall_time)


def _began(path: Path) -> float:
    """Seconds since 1970 at which an event file was opened: the first number of its name."""
    return float(path.name.split(".")[3])


def _curve(name: str, values: dict[int, float]) -> Curve:
    steps = sorted(values)
    return Curve(name, np.array(steps, dtype=np.int64), np.array([values[step] for step in steps]))
