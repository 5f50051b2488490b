"""The checks of every run, on curves that are drawn."""

import zipfile

import numpy as np
import pytest

from nextflow.diagnosis.training import (
    check_checkpoint,
    check_end,
    check_finite,
    check_gradients,
    check_learning,
    check_schedule,
    check_validation,
)


def noisy(values) -> np.ndarray:
    return np.asarray(values) + 0.02 * np.random.default_rng(0).standard_normal(len(values))


FALLING = noisy(2 + 6 * np.exp(-np.arange(100) / 15))
TRANSFORMER = {"train/loss_image": FALLING}
"""Makes a run one of the transformer."""


def config(**model) -> dict:
    return {
        "trainer": {"max_steps": 100, "log_every_n_steps": 1, "gradient_clip_val": 1.0},
        "model": {"init_args": model},
    }


def test_nan_is_named_with_its_step(drawn, findings) -> None:
    run = drawn({"train/loss": [3, 2, float("nan"), float("nan")], "val/loss": [1, 1, 1, float("inf")], **TRANSFORMER})
    finding = findings(check_finite(run))["not finite"]
    assert finding.severity == "fault" and "train/loss is NaN or infinite at step 2, as 1 other" in finding.sentence


@pytest.mark.parametrize(
    ("values", "severity"),
    [
        (FALLING, None),
        (noisy(np.full(100, 8.0)), "fault"),  # learns nothing
        (noisy(np.linspace(4, 9, 100)), "fault"),  # diverges from the start
        (noisy(np.concatenate([np.linspace(8, 2, 60), np.linspace(2, 4, 40)])), "warning"),  # loses what it gained
        (noisy(np.concatenate([np.linspace(8, 2, 60), np.linspace(2, 30, 40)])), "fault"),
        (noisy(np.concatenate([[8, 90, 200, 90, 20], np.linspace(8, 2, 95)])), "fault"),  # explodes, and comes back
    ],
)
def test_learning(drawn, findings, values, severity) -> None:
    found = findings(check_learning(drawn({"train/loss": values, **TRANSFORMER}, config(warmup_steps=5))))
    assert (found["learning"].severity if found else None) == severity
    if found:
        assert "model.optimizer.lr" in found["learning"].advice


def test_a_run_that_goes_on_from_a_checkpoint_need_not_fall(drawn, findings) -> None:
    flat = {"train/loss": noisy(np.full(100, 2.0)), **TRANSFORMER}
    assert not findings(check_learning(drawn(flat, config(initialize_from="before.ckpt"))))


def test_a_curriculum_is_judged_by_its_last_stage(drawn, findings) -> None:
    """The loss of the higher level is larger: that is no divergence."""
    stages = np.repeat([0.0, 1.0], 50)
    values = noisy(np.concatenate([np.linspace(8, 1, 50), np.linspace(7, 4, 50)]))
    assert not findings(check_learning(drawn({"train/loss": values, "curriculum/stage": stages, **TRANSFORMER})))
    assert findings(check_learning(drawn({"train/loss": values, **TRANSFORMER})))


def test_too_short_to_tell(drawn, missing) -> None:
    assert missing(check_learning(drawn({"train/loss": [3, 2], **TRANSFORMER}))) == ["whether the loss falls"]


def test_overfitting(drawn, findings) -> None:
    curves = {"train/loss": FALLING, "val/loss": FALLING, "train/loss_image": FALLING, "val/loss_image": FALLING}
    assert not findings(check_validation(drawn(curves)))
    rising = np.concatenate([FALLING[:50], np.linspace(FALLING[49], 4, 50)])
    found = findings(check_validation(drawn({**curves, "val/loss_image": rising})))
    assert found["overfitting"].severity == "warning" and "lowest at step" in found["overfitting"].seen
    apart = findings(check_validation(drawn({**curves, "val/loss_image": 4 + FALLING})))
    assert apart["overfitting"].severity == "note"


def test_gradients(drawn, findings, missing) -> None:
    norms = noisy(np.full(100, 1.0))
    assert not findings(check_gradients(drawn({"train/gradient_norm": norms, **TRANSFORMER}, config())))
    spiked = norms.copy()
    spiked[[60, 80]] = 50
    finding = findings(check_gradients(drawn({"train/gradient_norm": spiked, **TRANSFORMER}, config())))["gradients"]
    assert "2 spikes" in finding.seen and "step 60" in finding.seen
    clipped = findings(check_gradients(drawn({"train/gradient_norm": 30 * norms, **TRANSFORMER}, config())))
    assert "trainer.gradient_clip_val" in clipped["gradients"].advice
    assert missing(check_gradients(drawn(TRANSFORMER, config()))) == ["gradient norms"]


def test_schedules(drawn, findings, missing) -> None:
    warm = np.concatenate([np.linspace(0, 1, 10), np.linspace(1, 0.05, 90)])
    run = drawn({"lr-AdamW/pg1": warm, **TRANSFORMER}, config(final_learning_rate=0.05))
    assert not findings(check_schedule(run))
    long = drawn({"lr-AdamW/pg1": 0.5 + 0.5 * warm, **TRANSFORMER}, config(final_learning_rate=0.05))
    assert "schedule was made for a longer one" in findings(check_schedule(long))["learning rate"].advice
    other = drawn({"lr-AdamW/pg1": warm, **TRANSFORMER}, config(final_learning_rate=0.05, total_steps=300))
    assert "spans 300 steps, the run 100" in findings(check_schedule(other))["learning rate"].seen


def test_interrupted_and_under_way(drawn, findings, missing) -> None:
    run = drawn({"train/loss": FALLING[:40], **TRANSFORMER}, config())  # FALLING of TRANSFORMER has all steps
    assert not findings(check_end(run))
    half = drawn({"train/loss": [1.0]}, {"trainer": {"max_steps": 500, "log_every_n_steps": 10}})
    assert findings(check_end(half))["under way"].severity == "note"
    object.__setattr__(half, "age", 9999.0)
    assert "--ckpt_path last" in findings(check_end(half))["interrupted"].advice
    assert missing(check_end(drawn({"train/loss": [1.0]}, {}))) == ["whether it is over"]


def test_checkpoint_is_whole_and_has_its_average(drawn, findings) -> None:
    average = {"trainer": {"callbacks": [{"class_path": "nextflow.callbacks.ema.EMA", "init_args": {"decay": 0.9}}]}}
    run = drawn({"train/loss": [1.0]}, average)
    assert not findings(check_checkpoint(run))  # there is none
    path = run.folder / "last.ckpt"
    for names, about in ((b"ema.weight", None), (b"transformer.weight", "moving average")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("last/data.pkl", names)
        assert list(findings(check_checkpoint(run))) == ([about] if about else [])
    path.write_bytes(path.read_bytes()[:20])
    assert findings(check_checkpoint(run))["checkpoint"].severity == "fault"
