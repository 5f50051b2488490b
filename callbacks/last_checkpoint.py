"""The checkpoint of a run that is worth having twice: to resume from, and as its result. Nothing that happens harms it.

A new one is written beside the last one and takes its place when it is whole, in one step of the file system: a file is
renamed; of the folders that `save_distributed_checkpoint: true` writes, `last.ckpt` is a symbolic link that is exchanged.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.checkpoint.api import CheckpointException


class LastCheckpoint(ModelCheckpoint):
    """Keeps DIRPATH/last.ckpt: every few steps, at the end of training, and when SIGTERM or Ctrl-C asks the run to end.

    Lightning's `ModelCheckpoint(save_last=True, every_n_train_steps=100)` leaves the state of step 700 behind a run of 760.
    The last step itself is saved once its validation is over, so that a run interrupted there validates when it is resumed.

    A run that begins where another one left its last.ckpt, and does not resume from it, takes that name over as it first
    saves: the other's becomes previous.ckpt, so that last.ckpt is always of the run that was started last.

    After SIGTERM (a scheduler's notice) or a first Ctrl-C the optimiser step under way is finished, on all ranks, its state
    saved, and the process ends with status 143 or 130; `--ckpt_path last` goes on there. A second Ctrl-C ends it at once.
    A disk that is full ends the run with an error.

    Args:
        dirpath: folder of the checkpoint; the logger's own if not given.
        every_n_train_steps: optimiser steps between two checkpoints.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 100) -> None:
        super().__init__(
            dirpath=dirpath,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,  # which would name the second run's last-v1.ckpt
        )
        self._told_to_end: signal.Signals | None = None
        self._owns_last = False
        self._step = 0

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        self._settle_folder(trainer)  # Lightning asks for `--ckpt_path last` before it sets callbacks up
        return {path for path in super()._find_last_checkpoints(trainer) if path.endswith(self.FILE_EXTENSION)}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._settle_folder(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _Direct()
        # Modules that optimise by themselves (tokenizer, GRPO) are saved behind their batch, which is what is wanted.
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        super().setup(trainer, pl_module, stage)

    def _settle_folder(self, trainer: L.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = trainer.log_dir or trainer.default_root_dir

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take SIGTERM over from Lightning, whose handler talks to other ranks in the middle of their own talk, and Ctrl-C."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                rank_zero_info("\nCtrl-C: the step under way is finished and saved; Ctrl-C again ends at once")
            self._told_to_end = signal.Signals(number)

        # Only the main thread may; a trainer in another one is not what a scheduler addresses.
        with suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # as a shell gives it to what runs in the background
                    signal.signal(number, note)  # Lightning restores what was there before the run

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and (told := self._all_told_to_end(trainer)):
            if self._last_global_step_saved != trainer.global_step:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            rank_zero_info(
                f"{told.name}: saved step {trainer.global_step} to {self.last_model_path}; --ckpt_path last goes on there"
            )
            sys.exit(128 + told)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _all_told_to_end(self, trainer: L.Trainer) -> signal.Signals | None:
        # One rank may hear of it a step before the others.
        if trainer.world_size == 1:
            return self._told_to_end
        told = torch.tensor(float(self._told_to_end or 0), device=trainer.strategy.root_device)
        highest = int(trainer.strategy.reduce(told, reduce_op="max"))
        return signal.Signals(highest) if highest else None

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        draft, last = Path(f"{filepath}.saving"), Path(filepath)
        if trainer.is_global_zero:
            _remove(draft)  # of a run that was killed here
        trainer.strategy.barrier()
        try:
            super()._save_checkpoint(trainer, str(draft))
        except (OSError, RuntimeError, CheckpointException) as error:
            if trainer.is_global_zero:
                _remove(draft)
            whole = f"{last} is the one before and whole" if last.exists() else "There is none before it"
            raise OSError(
                f"the checkpoint of step {trainer.global_step} could not be written to {last.parent}: {_reason(error)}. "
                f"{whole}. Is the disk full? Make room and go on with --ckpt_path last"
            ) from error
        if trainer.is_global_zero:
            if not self._owns_last and last.exists() and not _is_same(last, trainer.ckpt_path):
                _set_aside(last, last.with_name("previous.ckpt"))
            _replace(last, draft)
        self._owns_last = True
        trainer.strategy.barrier()
        self._last_checkpoint_saved = filepath


class _Direct(TorchCheckpointIO):
    """Writes where it is told to. Lightning's own builds the file in memory and then in the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


def _is_same(last: Path, resumed: str | Path | None) -> bool:
    return resumed is not None and Path(resumed).exists() and last.samefile(resumed)


def _set_aside(last: Path, previous: Path) -> None:
    rank_zero_info(f"{last} is of another run, which this one does not resume: it is now {previous.name}")
    _remove(previous)
    if last.is_symlink():  # the folder itself moves, as the next ones take turns with its name
        os.replace(last.with_name(os.readlink(last)), previous)
        last.unlink()
    else:
        os.replace(last, previous)


def _replace(last: Path, draft: Path) -> None:
    old = last.with_name(os.readlink(last)) if last.is_symlink() else None
    if last.is_dir() and old is None:
        _remove(last)  # a folder that Lightning wrote, which cannot be exchanged
    if draft.is_dir():
        first, second, link = (last.with_name(f"{last.name}.{ending}") for ending in ("a", "b", "link"))
        new = second if old == first else first
        _remove(new)
        _remove(link)
        os.replace(draft, new)
        link.symlink_to(new.name)
        draft = link
    os.replace(draft, last)
    _remove(old)


def _remove(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    # torch's archives say where they stopped, and why only in the error before it.
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_reason(failure)}" for rank, (failure, _) in error.failures.items())
    return str(error.__context__ if isinstance(error.__context__, OSError) else error).split("\n")[0]
