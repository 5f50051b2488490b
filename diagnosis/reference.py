"""What a run of a recipe is expected to look like: ranges of its figures at a few steps, recorded from good runs.

    kind: pretraining
    steps: 1700
    metrics:
      val/loss_image: {424: [6.628, 6.898], 1699: [5.556, 5.826]}
    settings:
      model.optimizer: {lr: 0.0015, weight_decay: 0.05}

A range is the recorded value and, on both sides, the largest of 2 % of it, a tenth of what the metric changed by in the run,
three standard errors, and the figure's own slack. `settings` are those of the recorded run, so that a run that is off can be
told what it does differently. Nobody types these files: `doctor RUN --record` writes them, `--widen` takes one more good run
into the ranges (another seed, another machine).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nextflow.diagnosis.curve import Curve
from nextflow.diagnosis.examination import FIGURES, Figure
from nextflow.diagnosis.finding import Finding, Missing, number
from nextflow.diagnosis.run import TrainingRun

POINTS = 5
"""Steps of each metric, at most."""

WHOLE = ("val/", "tokenizer/")
"""Metrics of a whole data set; no means are needed."""

TRAINER = (
    "precision",
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "devices",
    "num_nodes",
)
CALLBACKS = ("ResolutionCurriculum", "ScaleDropout", "SelfCorrection", "EMA")
WITHOUT_EFFECT = {
    "num_workers", "cache_megabytes", "window_shards", "max_bad_fraction", "base_grids", "test_splits", "predict_splits",
    "evaluation", "fused", "foreach", "capturable", "differentiable", "amsgrad", "maximize",
}  # fmt: skip
"""Settings that change no result, or are too long to be read."""


class Range(NamedTuple):
    """Values that are as expected."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is expected of a run."""

    kind: str
    steps: int
    metrics: Mapping[str, Mapping[int, Range]]
    """By name and step."""
    settings: Mapping[str, Any]
    """By key, `model.optimizer.lr`."""


def home_of(run: TrainingRun) -> str | None:
    """The folder that the config's logger names, runs/RECIPE/STAGE, wherever it lies now."""
    folder, name = run.setting("trainer.logger.save_dir"), run.setting("trainer.logger.name")
    return f"{folder}/{name}" if folder and name else None


def reference_of(run: TrainingRun, root: Path) -> Path | None:
    """Where the reference of a run belongs: runs/RECIPE/STAGE -> ROOT/configs/RECIPE/reference/STAGE.yaml.

    None for a run of no recipe.
    """
    home = Path(home_of(run) or "")
    recipe = root / "configs" / home.parent.name
    return recipe / "reference" / f"{home.name}.yaml" if home.parent.name and recipe.is_dir() else None


def record(run: TrainingRun) -> Reference:
    """A reference that a run is in the middle of.

    Raises ValueError for a run that is not over, or without figures.
    """
    if run.planned is not None and run.steps < run.planned - run.setting("trainer.log_every_n_steps", 50):
        raise ValueError(
            f"{run.folder}: it is at step {run.steps} of {run.planned}; only a whole run becomes a reference"
        )
    metrics = {}
    for figure in FIGURES[run.kind]:
        curve = run.curve(figure.name)
        if curve is not None:
            metrics[figure.name] = {step: _range(curve, figure, step, run.steps) for step in _steps(curve, run.steps)}
    if not metrics:
        raise ValueError(f"{run.folder}: it has none of {', '.join(figure.name for figure in FIGURES[run.kind])}")
    return Reference(kind=run.kind, steps=run.steps, metrics=metrics, settings=settings_of(run.config))


def widen(reference: Reference, run: TrainingRun) -> Reference:
    """The ranges that also hold this run.

    Raises ValueError for a run of another kind or other settings.
    """
    changed = differences(reference, run)
    if run.kind != reference.kind or changed:
        raise ValueError(
            f"{run.folder} is no second run of the reference, as {'; '.join(changed) or 'it is ' + run.kind}"
        )
    metrics = {}
    for name, ranges in reference.metrics.items():
        curve = run.curve(name)
        metrics[name] = {step: _joined(one, _value(curve, step, reference.steps)) for step, one in ranges.items()}
    return replace(reference, metrics=metrics)


def compare(run: TrainingRun, reference: Reference) -> Iterator[Finding | Missing]:
    """Where a run leaves the ranges.

    Raises ValueError for a reference of another kind of run.
    """
    if reference.kind != run.kind:
        raise ValueError(f"{run.folder} is a run of kind {run.kind}, but the reference is one of {reference.kind}")
    changed = differences(reference, run)
    suspects = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
    advice = (
        f"see what is set differently: {suspects}" if changed else "the settings are equal: see the data and the code"
    )
    better = {figure.name: figure.better for figure in FIGURES[run.kind]}
    for name, ranges in reference.metrics.items():
        values = {step: _value(run.curve(name), step, reference.steps) for step in ranges}
        outside = [
            step
            for step, value in values.items()
            if value is not None and not ranges[step].low <= value <= ranges[step].high
        ]
        if all(value is None for value in values.values()):
            if run.steps >= min(ranges):
                yield Missing(f"{name} against the reference", f"{name}, which the reference has")
        elif outside:
            step = outside[-1]
            last = max(step for step, value in values.items() if value is not None)
            yield _outside(
                name, better.get(name, "neither"), step, float(values[step] or 0.0), ranges[step], step == last, advice
            )
    if changed:
        yield Finding(
            severity="note",
            about="settings",
            seen=f"the settings differ from the reference's: {suspects}",
            expected="equal settings, for its ranges to hold",
            advice="record a reference of its own with --record, if this is the better recipe",
        )


def differences(reference: Reference, run: TrainingRun) -> list[str]:
    """Settings that run and reference both have and that differ, in words."""
    ours = settings_of(run.config)
    return [
        f"{key} is {ours[key]}, not {theirs}"
        for key, theirs in reference.settings.items()
        if key in ours and ours[key] != theirs
    ]


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, words and short lists of a merged config that a result depends on, by key; paths are left out."""
    trainer = config.get("trainer") or {}
    parts: dict[str, Any] = {"trainer": {key: trainer.get(key) for key in TRAINER}}
    for callback in trainer.get("callbacks") or []:
        name = callback["class_path"].rsplit(".", 1)[-1]
        if name in CALLBACKS:
            parts[name] = callback.get("init_args") or {}
    parts |= {name: config.get(name) or {} for name in ("model", "data")}
    return dict(_flat(parts, ""))


def read(path: Path) -> Reference:
    """A reference from its file.

    Raises ValueError for a file that is none.
    """
    stored = yaml.safe_load(path.read_text())
    if not isinstance(stored, dict) or not {"kind", "steps", "metrics"} <= set(stored):
        raise ValueError(f"{path} is no reference of doctor's: it lacks kind, steps or metrics")
    metrics = {
        name: {step: Range(*pair) for step, pair in ranges.items()} for name, ranges in stored["metrics"].items()
    }
    settings = {
        f"{part}.{key}": value for part, values in stored.get("settings", {}).items() for key, value in values.items()
    }
    return Reference(kind=stored["kind"], steps=stored["steps"], metrics=metrics, settings=settings)


def write(reference: Reference, path: Path, command: str) -> None:
    """Write the file, with the command that made it on top."""
    settings: dict[str, dict[str, Any]] = {}
    for key, value in reference.settings.items():
        part, _, last = key.rpartition(".")
        settings.setdefault(part, {})[last] = value
    metrics = {name: {step: list(one) for step, one in ranges.items()} for name, ranges in reference.metrics.items()}
    lines = [f"kind: {reference.kind}", f"steps: {reference.steps}"]
    for title, parts in (("metrics", metrics), ("settings", settings)):
        lines += [f"{title}:", *(f"  {name}: {_in_one_line(part)}" for name, part in parts.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    note = "# What `doctor` expects: ranges of figures at some steps, and the settings they were recorded with."
    path.write_text("\n".join([note, f"#   {command}", *lines, ""]))


def _in_one_line(values: Mapping[Any, Any]) -> str:
    return yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def _steps(curve: Curve, steps: int) -> list[int]:
    """Up to five steps: those of the points of a sparse curve, else fifths of the run."""
    if len(curve) <= POINTS:
        return [int(step) for step in curve.step_N]
    wanted = [steps * part / POINTS for part in range(1, POINTS + 1)]
    return sorted({int(curve.step_N[abs(curve.step_N - step).argmin()]) for step in wanted})


def _value(curve: Curve | None, step: int, steps: int) -> float | None:
    """Of training, whose values are those of a batch, the mean over a twentieth of the run; of validation the value itself."""
    if curve is None or step > curve.step_N[-1]:
        return None
    window = max(1, steps // 20)
    if not curve.name.startswith(WHOLE):
        return curve.at(step, window)
    near = curve.since(step - window + 1)
    return float(near.value_N[near.step_N <= step][-1]) if len(near) and near.step_N[0] <= step else None


def _range(curve: Curve, figure: Figure, step: int, steps: int) -> Range:
    value = _value(curve, step, steps)
    assert value is not None  # the step is one of the curve's
    points = ((curve.step_N > step - max(1, steps // 20)) & (curve.step_N <= step)).sum()
    span = float(curve.value_N.max() - curve.value_N.min()) if len(curve) > 1 else 0.0
    slack = max(0.02 * abs(value), 0.1 * span, 3 * curve.noise / math.sqrt(points), figure.slack)
    low = max(0.0, value - slack) if curve.value_N.min() >= 0 else value - slack
    return Range(_rounded(low), min(_rounded(value + slack), figure.most))


def _joined(one: Range, value: float | None) -> Range:
    """The range with half its width around another value as well."""
    if value is None:
        return one
    slack = (one.high - one.low) / 2
    return Range(_rounded(min(one.low, value - slack)), _rounded(max(one.high, value + slack)))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _outside(name: str, better: str, step: int, value: float, one: Range, at_end: bool, advice: str) -> Finding:
    good = (better == "lower" and value < one.low) or (better == "higher" and value > one.high)
    far = max(one.low - value, value - one.high) > one.high - one.low
    return Finding(
        severity="note" if good or not at_end else "fault" if far else "warning",
        about="reference",
        seen=f"{name} is {number(value)} at step {step}" + (", better than the reference" if good else ""),
        expected=f"{number(one.low)} to {number(one.high)}, as recorded",
        advice="record it with --record, if it is no accident" if good else advice,
    )


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key)
        if key in WITHOUT_EFFECT or inner is None:
            continue
        if isinstance(inner, Mapping):
            yield from _flat(inner, name)
        elif isinstance(inner, list):
            if len(inner) <= 10:
                yield from (
                    [(name, inner)]
                    if all(isinstance(one, (int, float, str)) for one in inner)
                    else _flat({str(index): one for index, one in enumerate(inner)}, name)
                )
        elif not (isinstance(inner, str) and "/" in inner):
            yield name, inner
