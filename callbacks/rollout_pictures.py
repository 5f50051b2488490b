"""Sheets of roll-outs with their rewards: the pictures of some groups, and the best and the worst of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image

from nextflow.callbacks.images import show
from nextflow.evaluation.pictures import Cell, draw_sheet


class RolloutPictures(L.Callback):
    """Draws the last training batch of a module with `last_rollouts` (prompts, images, rewards, num_generations).

    Every sheet goes to TensorBoard, where there is one, as grpo/rollouts, and to OUTPUT/STEP.png.

    Args:
        every_n_steps: optimiser steps between sheets; the first batch is drawn too.
        num_groups: groups of a sheet, one row each; a row of the best and one of the worst pictures follow.
        output: folder to write to; `pictures` in the logger's folder if not given.
    """

    def __init__(self, every_n_steps: int = 50, num_groups: int = 4, output: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"RolloutPictures.every_n_steps must be positive, not {every_n_steps}")
        self.every_n_steps, self.num_groups, self.output = every_n_steps, num_groups, output
        self.folder: Path | None = None
        self._next = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Ask for the logger's folder, on all processes: they agree on it by a broadcast."""
        if not trainer.fast_dev_run:  # which writes nothing
            self.folder = Path(self.output or Path(trainer.log_dir or trainer.default_root_dir) / "pictures")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Draw a sheet where one is due."""
        if trainer.global_step < self._next or not trainer.is_global_zero or not pl_module.last_rollouts.images:
            return
        self._next = trainer.global_step - trainer.global_step % self.every_n_steps + self.every_n_steps
        sheet = self.sheet(pl_module.last_rollouts)
        show(trainer, "grpo/rollouts", sheet)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(self.folder / f"{trainer.global_step:06d}.png")

    def sheet(self, rollouts: Any) -> Image.Image:
        """The sheet of a batch."""
        group = rollouts.num_generations
        cells = [
            Cell(image.numpy(), f"{reward:.3f} {prompt}")
            for image, reward, prompt in zip(rollouts.images, rollouts.rewards.tolist(), rollouts.prompts)
        ]
        order = torch.argsort(rollouts.rewards, stable=True).tolist()
        rows = [cells[start : start + group] for start in range(0, min(len(cells), self.num_groups * group), group)]
        rows.append([cells[index] for index in order[::-1][:group]])
        rows.append([cells[index] for index in order[:group]])
        return draw_sheet(rows, side=96)
