"""The checkpoint of a run that is worth having twice: to resume from, and as its result."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps DIRPATH/last.ckpt: every few steps, and at the end of training.

    Lightning's `ModelCheckpoint(save_last=True, every_n_train_steps=100)` leaves the state of step 700 behind a run of 760.
    The last step itself is saved once its validation is over, so that a run interrupted there validates when it is resumed.

    Args:
        dirpath: folder of the checkpoint; the logger's own if not given.
        every_n_train_steps: optimiser steps between two checkpoints.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 100) -> None:
        super().__init__(dirpath=dirpath, save_top_k=0, save_last=True, every_n_train_steps=every_n_train_steps)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        self._settle_folder(trainer)  # Lightning asks for `--ckpt_path last` before it sets callbacks up
        return super()._find_last_checkpoints(trainer)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._settle_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def _settle_folder(self, trainer: L.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = trainer.log_dir or trainer.default_root_dir

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
