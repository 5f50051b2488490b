"""What is read from a run's folder."""

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from nextflow.diagnosis.run import TrainingRun, find_runs, read_run


def write(folder, name: str, steps, began: int, value: float = 0.0) -> None:
    """An event file that was opened `began` seconds after 1970."""
    writer = SummaryWriter(folder, filename_suffix=f".{began}")
    for step in steps:
        writer.add_scalar(name, value, step)
    writer.close()
    (path,) = folder.glob(f"events*.{began}")
    path.rename(folder / f"events.out.tfevents.{began}.host")


def test_what_was_lost_and_done_again_counts_once(tmp_path) -> None:
    write(tmp_path, "train/loss", range(0, 60, 10), began=100, value=1.0)
    write(tmp_path, "train/loss", range(30, 90, 10), began=200, value=2.0)  # resumed from step 30
    write(tmp_path, "val/psnr", [0], began=300)  # `validate`, later
    run = read_run(tmp_path)
    assert run is not None
    curve = run.curves["train/loss"]
    assert curve.step_N.tolist() == list(range(0, 90, 10))
    assert curve.value_N.tolist() == [1.0] * 3 + [2.0] * 6
    assert "val/psnr" not in run.curves
    assert run.steps == 81


def test_a_folder_of_measurements_is_no_run(tmp_path) -> None:
    write(tmp_path, "test/psnr", [0], began=100)
    assert read_run(tmp_path) is None


def test_runs_are_found_in_folders(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="TensorBoardLogger"):
        find_runs(tmp_path)
    for name in ("b", "a/deep"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name, "train/loss", [0], began=100)
    assert find_runs(tmp_path) == [tmp_path / "a" / "deep", tmp_path / "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]


@pytest.mark.parametrize(
    ("config", "planned"),
    [
        ("trainer: {max_steps: 70, max_epochs: -1}", 70),
        (
            "trainer: {max_steps: -1, max_epochs: 2, accumulate_grad_batches: 4}\ndata: {init_args: {batches_per_epoch: 10}}",
            6,
        ),
        ("trainer: {max_steps: -1, max_epochs: 2}", None),
        (
            """
trainer:
  max_steps: -1
  max_epochs: 2
  callbacks:
    - class_path: nextflow.callbacks.resolution_curriculum.ResolutionCurriculum
      init_args: {stages: [{level: 32, num_batches: 20}, {level: 64, num_batches: 30}]}
""",
            50,
        ),
        ("{}", None),
    ],
)
def test_planned_steps(drawn, config: str, planned: int | None) -> None:
    assert drawn({"train/loss": [1.0]}, yaml.safe_load(config)).planned == planned


def test_settings_step_over_init_args(drawn) -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5, "foreach": None}}
    run = drawn({"train/loss": [1.0]}, {"model": {"class_path": "a.B", "init_args": {"optimizer": optimizer}}})
    assert run.setting("model.optimizer.lr") == 0.5
    assert run.setting("model.optimizer.foreach", 7) == 7
    assert run.setting("model.optimizer.lr.more") is None
    assert run.setting("data.batch_size") is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("grpo/reward", "grpo"),
        ("train/loss_text", "pretraining"),
        ("train/loss_mse", "tokenizer"),
        ("train/accuracy", "contrastive"),
    ],
)
def test_kinds(drawn, name: str, kind: str) -> None:
    assert drawn({"train/loss": [1.0], name: [1.0]}).kind == kind


def test_a_run_of_something_else_is_refused(drawn) -> None:
    with pytest.raises(ValueError, match="of no module that doctor knows"):
        _ = drawn({"train/loss": [1.0]}).kind


def test_the_last_stage_of_a_curriculum(tmp_path) -> None:
    writer = SummaryWriter(tmp_path)
    for step, stage in ((0, 0), (40, 1), (90, 2)):
        writer.add_scalar("curriculum/stage", stage, step)
    writer.add_scalar("train/loss_text", 1.0, 100)
    writer.close()
    run = read_run(tmp_path)
    assert isinstance(run, TrainingRun) and run.last_stage == 90
