"""RolloutPictures: a sheet at the first batch and then every so many steps, with groups, best and worst."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from nextflow.callbacks.rollout_pictures import RolloutPictures


def module():
    images = [torch.full((8, 8, 3), 10 * index, dtype=torch.uint8) for index in range(6)]
    return SimpleNamespace(
        last_rollouts=SimpleNamespace(
            prompts=["a", "a", "a", "b", "b", "b"],
            images=images,
            rewards=torch.tensor([0.3, 0.1, 0.2, 0.6, 0.5, 0.4]),
            num_generations=3,
        )
    )


def drawn(callback, log_dir, *steps, fast_dev_run=False):
    """Trains a batch at each step, two optimiser steps a batch."""
    trainer = SimpleNamespace(is_global_zero=True, loggers=[], log_dir=str(log_dir), fast_dev_run=fast_dev_run)
    callback.on_fit_start(trainer, module())
    for trainer.global_step in steps:
        callback.on_train_batch_end(trainer, module(), None, None, 0)


def test_sheets_are_written_when_due(tmp_path):
    drawn(RolloutPictures(every_n_steps=4, output=str(tmp_path)), tmp_path / "log", 2, 4, 6, 8, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002.png", "000004.png", "000008.png"]


def test_sheets_lie_beside_the_log_if_nothing_else_is_said(tmp_path):
    drawn(RolloutPictures(), tmp_path / "log", 1)
    assert (tmp_path / "log/pictures/000001.png").is_file()


def test_fast_dev_run_writes_nothing(tmp_path):
    drawn(RolloutPictures(output=str(tmp_path / "sheets")), tmp_path / "log", 1, fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_best_and_worst_stand_below_the_groups():
    sheet = RolloutPictures(num_groups=1).sheet(module().last_rollouts)
    assert isinstance(sheet, Image.Image)
    step = sheet.height // 3
    rows = [[sheet.getpixel((50 + 108 * column, 50 + step * row))[0] for column in range(3)] for row in range(3)]
    assert rows == [[0, 10, 20], [30, 40, 50], [10, 20, 0]]


def test_interval_is_positive():
    with pytest.raises(ValueError, match="every_n_steps"):
        RolloutPictures(every_n_steps=0)
