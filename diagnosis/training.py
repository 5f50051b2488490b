"""What is checked in every run: whether it learns, at what pace, to its end, and without spikes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator

import numpy as np

from nextflow.diagnosis.curve import Curve
from nextflow.diagnosis.finding import Finding, Missing, number
from nextflow.diagnosis.run import TrainingRun

LEARNING_RATE = {"tokenizer": "model.generator_optimizer.lr"}
"""Key of the learning rate, where it is not model.optimizer.lr."""

CLIPPING = {"tokenizer": "model.gradient_clip", "grpo": "model.max_grad_norm"}
"""Key of the largest gradient norm, where it is not trainer.gradient_clip_val."""

SPIKE = 10.0
"""A gradient norm of so many medians is a spike."""

EXPLODED = 10.0
"""A loss of so many times its first value has exploded."""

STILL = 600.0
"""Seconds since the last logged value after which a run no longer counts as under way."""


def slower(run: TrainingRun) -> str:
    """The advice against steps that are too large."""
    rate = LEARNING_RATE.get(run.kind, "model.optimizer.lr")
    clip = CLIPPING.get(run.kind, "trainer.gradient_clip_val")
    return f"lower {said(run, rate)}, raise {said(run, 'model.warmup_steps')} or set {said(run, clip)}"


def said(run: TrainingRun, key: str) -> str:
    """A key with its value in this run: "model.warmup_steps (now 50)"."""
    value = run.setting(key)
    return key if value is None else f"{key} (now {number(value) if isinstance(value, float) else value})"


def learned_from(run: TrainingRun) -> Curve | None:
    """The training loss that should fall, over the last stage of a curriculum."""
    # The tokenizer's total holds the adversarial term, which is no measure of progress.
    names = ("train/loss_mse", "train/loss_l1", "train/loss") if run.kind == "tokenizer" else ("train/loss",)
    for name in names:
        curve = run.curve(name)
        if curve is not None:
            return curve.since(run.last_stage)
    return None


def check_finite(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Nothing that is logged may be NaN or infinite."""
    broken = [curve for curve in run.curves.values() if len(curve.finite) < len(curve)]
    if broken:
        first = min(broken, key=lambda curve: int(curve.step_N[~np.isfinite(curve.value_N)][0]))
        step = int(first.step_N[~np.isfinite(first.value_N)][0])
        others = f", as {len(broken) - 1} other metrics" if len(broken) > 1 else ""
        yield Finding(
            severity="fault",
            about="not finite",
            seen=f"{first.name} is NaN or infinite at step {step}{others}",
            expected="finite numbers",
            advice=f"{slower(run)}, and start again from a checkpoint before that step",
        )


def check_learning(run: TrainingRun) -> Iterator[Finding | Missing]:
    """The loss falls, and keeps what it has gained."""
    if run.kind == "grpo":  # its loss is near 0 by construction
        return
    curve = learned_from(run)
    if curve is None or len(curve) < 5:
        yield Missing("whether the loss falls", "five points of train/loss: a smaller trainer.log_every_n_steps")
        return
    rise, first, worst = curve.rise(), float(curve.value_N[0]), int(curve.value_N.argmax())
    if curve.value_N[worst] > EXPLODED * first > 0:
        yield Finding(
            severity="fault",
            about="learning",
            seen=f"{curve.name} went up to {number(curve.value_N[worst])} at step {curve.step_N[worst]}, from {number(first)} "
            f"at step {curve.step_N[0]}, and ends at {number(curve.end)}",
            expected="a loss that never goes far above where it began",
            advice=slower(run) + "; what was lost there does not come back, even if the curve does",
        )
    elif run.starts_anew and curve.change >= 0:
        yield Finding(
            severity="fault",
            about="learning",
            seen=f"{curve.name} went from {number(curve.start)} to {number(curve.end)} and so has not fallen beyond its noise",
            expected="a loss that falls from a start with random weights",
            advice=slower(run) + "; if the curve is flat, raise the learning rate instead and look at the data",
        )
    elif rise is not None:
        yield Finding(
            severity="fault" if rise.end > curve.start else "warning",
            about="learning",
            seen=f"{curve.name} was lowest near step {rise.step} ({number(rise.low)}) and has risen to {number(rise.end)}",
            expected="a loss that falls until the end",
            advice=slower(run),
        )


def check_validation(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Held-out losses fall with those of training, and do not end far above them."""
    if run.kind != "pretraining":
        return
    trained = run.curve("train/loss")
    held_out = run.curve("val/loss")
    if trained is None or held_out is None:
        yield Missing("whether it generalises", "val/loss: a validation split and trainer.val_check_interval")
        return
    for name in ("loss_image", "loss_text"):
        ours, theirs = run.curve(f"train/{name}"), run.curve(f"val/{name}")
        if ours is None or theirs is None:
            continue
        ours, theirs = ours.since(run.last_stage), theirs.since(run.last_stage)
        if not len(ours) or not len(theirs):
            continue
        best = int(theirs.value_N.argmin())
        rise = theirs.last - theirs.value_N[best]
        if len(theirs) > 1 and rise > 0.05 * theirs.value_N[best] and ours.change <= 0:
            yield Finding(
                severity="warning",
                about="overfitting",
                seen=f"val/{name} was lowest at step {theirs.step_N[best]} ({number(theirs.value_N[best])}) and ends at "
                f"{number(theirs.last)}, while train/{name} went from {number(ours.start)} to {number(ours.end)}",
                expected="both fall together",
                advice="train for fewer steps, on more data, or with more model.optimizer.weight_decay",
            )
        elif theirs.last - ours.end > max(1.0, 0.5 * ours.end):
            yield Finding(
                severity="note",
                about="overfitting",
                seen=f"val/{name} ends at {number(theirs.last)}, train/{name} at {number(ours.end)}",
                expected="little between them, unless the data are so few that the model knows them by heart",
                advice="more data or fewer steps, if what counts is what it has not seen",
            )


def check_gradients(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Gradient norms without spikes, and not all far above where they are clipped."""
    curve = run.curve("grpo/grad_norm" if run.kind == "grpo" else "train/gradient_norm")
    if curve is None:
        if run.kind == "pretraining":
            yield Missing("gradient norms", "train/gradient_norm: trainer.log_every_n_steps below the number of steps")
        return
    settled = curve.behind(0.2)
    high = settled.value_N > SPIKE * settled.median
    if high.any():
        yield Finding(
            severity="warning",
            about="gradients",
            seen=f"{curve.name} has {int(high.sum())} spikes above {SPIKE:.0f} times its median of {number(settled.median)}, "
            f"the first at step {settled.step_N[high][0]} ({number(settled.value_N[high][0])})",
            expected="norms of one order of magnitude behind the warm-up",
            advice=f"{slower(run)}; a spike at the same step of every run is a sample to look at",
        )
    key = CLIPPING.get(run.kind, "trainer.gradient_clip_val")
    clip = run.setting(key)
    if clip and settled.median > SPIKE * clip:
        yield Finding(
            severity="warning",
            about="gradients",
            seen=f"{curve.name} is {number(settled.median)} in the median, and clipped to {number(clip)} in nearly every step",
            expected=f"norms below {number(SPIKE * clip)}",
            advice=f"raise {key} and lower the learning rate, or find what makes gradients so large",
        )


def check_schedule(run: TrainingRun) -> Iterator[Finding | Missing]:
    """The learning rate ends where its schedule ends, and that is where the run ends."""
    wanted, planned = run.setting("model.total_steps"), run.planned
    final = run.setting("model.final_learning_rate")
    if wanted and planned and wanted != planned:
        yield Finding(
            severity="warning",
            about="learning rate",
            seen=f"the schedule of the learning rate spans {wanted} steps, the run {planned}",
            expected="both of one length",
            advice="leave model.total_steps out, so that it is that of the trainer",
        )
    rates = [run.curve(name) for name in sorted(run.curves) if name.startswith("lr-")]
    if not rates or rates[0] is None:
        if final is not None and final < 1:
            yield Missing("the learning rate", "the callback lightning.pytorch.callbacks.LearningRateMonitor")
        return
    rate, over = rates[0], planned is not None and run.steps >= planned
    ends_at = None if final is None else final * rate.value_N.max()
    if (
        over
        and not wanted
        and ends_at is not None
        and final < 0.5
        and rate.last > max(2 * ends_at, 0.3 * rate.value_N.max())
    ):
        yield Finding(
            severity="warning",
            about="learning rate",
            seen=f"the learning rate ends at {number(rate.last)}, {rate.last / rate.value_N.max():.0%} of its largest",
            expected=f"{number(ends_at)} at the end, by model.final_learning_rate",
            advice="set model.total_steps to the steps of the run: the schedule was made for a longer one",
        )


def check_end(run: TrainingRun) -> Iterator[Finding | Missing]:
    """The run did all of its steps."""
    if run.planned is None and run.ended_at is None:
        yield Missing("whether it is over", "the callback nextflow.callbacks.metrics_writer.MetricsWriter")
        return
    # The last few steps need not be logged.
    every = run.setting("trainer.log_every_n_steps", 50)
    if run.ended_at is not None or run.planned is None or run.steps > run.planned - every:
        return
    if run.age < STILL:
        yield Finding(
            severity="note",
            about="under way",
            seen=f"it is at step {run.steps} of {run.planned} and logged something {run.age:.0f} seconds ago",
            expected="the last step",
            advice="wait",
        )
        return
    yield Finding(
        severity="warning",
        about="interrupted",
        seen=f"it stopped at step {run.steps} of {run.planned}, and logged nothing since",
        expected="the last step",
        advice="give the same command again with --ckpt_path last",
    )


def check_checkpoint(run: TrainingRun) -> Iterator[Finding | Missing]:
    """The checkpoint is whole, and holds the moving average that the run keeps."""
    path = run.folder / "last.ckpt"
    if not path.is_file():  # one of distributed checkpoints is a folder
        return
    if not zipfile.is_zipfile(path):
        yield Finding(
            severity="fault",
            about="checkpoint",
            seen=f"{path.name} is cut off",
            expected="a whole file",
            advice="resume from an earlier one, and write them with nextflow.callbacks.last_checkpoint.LastCheckpoint, which "
            "leaves the last whole one in its place",
        )
        return
    if run.callback("EMA") is None:
        return
    # The part of the file that names its tensors: nothing else of it has to be read.
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        averaged = b"ema." in archive.read(pickled)
    if not averaged:
        yield Finding(
            severity="fault",
            about="moving average",
            seen="last.ckpt holds no moving average, though the config has the callback EMA",
            expected="weights under `ema.`",
            advice="train on with --ckpt_path last under this config, or do not ask for initialize_weights: ema of it",
        )


GENERAL = (
    check_finite,
    check_learning,
    check_validation,
    check_gradients,
    check_schedule,
    check_end,
    check_checkpoint,
)
