"""Training in stages of growing resolution (paper section 3.2.3): one stage is one epoch.

The stage is a function of the epoch, so there is nothing to checkpoint and a resumed run is where it was. The DataModule reads
its attribute `stages` and makes a loader of `num_batches` batches for each epoch; the learning-rate schedule spans all stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage."""

    level: int
    """Training resolution, a level of the schedule."""
    num_batches: int
    """Batches of the stage, on every rank."""
    alpha: float = 0.0
    """Scale reweighting k_s = 1 / (h_s * w_s)^alpha; the paper: 0 at level 256, 0.9 from 512 on."""
    batch_size: int | None = None
    """Rows of a batch; null keeps data.batch_size."""
    budget: int | None = None
    """Work of a batch in positions, where data.packing is fixed_budget; null keeps data.budget."""
    mixture: dict[str, float] | None = None
    """Weights of a MixtureDataModule's sources, by name; sources left out are not read. null keeps their own weights."""

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise ValueError(f"stages: num_batches must be at least 1, got {self.num_batches}")


class ResolutionCurriculum(L.Callback):
    """Sets `stages` of the DataModule and, where it is open, `total_steps` of the module; logs the stage.

    Args:
        stages: in the order of training.
    """

    def __init__(self, stages: list[Stage]) -> None:
        if not stages:
            raise ValueError("ResolutionCurriculum.stages is empty: give at least one stage")
        self.stages = stages

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the trainer and hand the stages over.

        Raises ValueError saying which trainer option to set.
        """
        if stage != "fit":  # validate and test see the last stage's level and alpha, as the end of fit does
            if hasattr(getattr(trainer, "datamodule", None), "stages"):
                trainer.datamodule.stages = [self.stages[-1]]
            return
        if trainer.reload_dataloaders_every_n_epochs != 1:
            raise ValueError("ResolutionCurriculum needs trainer.reload_dataloaders_every_n_epochs: 1")
        # Under fast_dev_run, which sets max_epochs to 1, one batch of the first stage is looked at.
        if trainer.max_epochs != len(self.stages) and not trainer.fast_dev_run:
            raise ValueError(
                f"ResolutionCurriculum has {len(self.stages)} stages, one per epoch: "
                f"set trainer.max_epochs to {len(self.stages)} (it is {trainer.max_epochs})"
            )
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "stages"):
            raise ValueError(
                f"ResolutionCurriculum needs a DataModule with the attribute `stages`, not {type(datamodule).__name__}"
            )
        names = getattr(datamodule, "source_names", [])
        for name in [name for one in self.stages for name in one.mixture or ()]:
            if name not in names:
                raise ValueError(f"stages: mixture names {name!r}, but the sources of the data are {names}")
        datamodule.stages = list(self.stages)
        if getattr(pl_module, "total_steps", 0) is None:
            accumulate = trainer.accumulate_grad_batches
            steps = sum(math.ceil(stage.num_batches / accumulate) for stage in self.stages)
            pl_module.total_steps = steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the next stage at its beginning when the checkpoint is that of the last batch of a stage.

        Lightning, too, begins an epoch then, but counts on from where the last one was, unless that is as long as the next:
        after 4 of 4 batches an epoch of 5 would have one batch. It gets a count that any epoch ends with.
        """
        loop = trainer.fit_loop.epoch_loop
        if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
            loop.batch_progress.current.completed = max(stage.num_batches for stage in self.stages)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the level and alpha of this stage."""
        stage = self.stages[trainer.current_epoch]
        for logger in trainer.loggers:
            logger.log_metrics(
                {
                    "curriculum/level": stage.level,
                    "curriculum/alpha": stage.alpha,
                    "curriculum/stage": trainer.current_epoch,
                },
                step=trainer.global_step,
            )
