"""A moving average of the weights, which is often the better model.

    average <- decay(n) * average + (1 - decay(n)) * weights      after optimiser step n = 1, 2, ...
    decay(n) = min(decay, n / (n + warmup))

The average is a submodule of the module: sharded (FSDP2), saved, resumed and spread over another number of processes with
everything else, under `ema.` in the checkpoint. Nothing else is state.

    callbacks:
      - class_path: nextflow.callbacks.ema.EMA
        init_args: {decay: 0.9999}
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class EMA(L.Callback):
    """Keeps `pl_module.ema`, the average of the submodule that `pl_module.averaged` names.

    Needs a module with these attributes: `averaged`, a name; `keeps_ema`, which is set here, upon which `configure_model`
    makes the copy `ema`. In `validate`, `test` and `predict` the callback makes a checkpoint's average answer.

    Args:
        decay: share of the average that stays in a step, from the end of the warm-up on; 0.9999 forgets in some 10,000 steps.
        warmup: after n steps the average spans the last n / (warmup + 1) or so; 0 averages with `decay` from the start.
        evaluate: whether validation, test and prediction use the average instead of the weights as they are.
    """

    def __init__(self, decay: float = 0.9999, warmup: float = 9.0, evaluate: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA.decay must be at least 0 and below 1, not {decay}")
        if warmup < 0:
            raise ValueError(f"EMA.warmup must not be negative, it is {warmup}")
        self.decay, self.warmup, self.evaluate = decay, warmup, evaluate
        self._step, self._swapped = 0, False

    def decay_at(self, step: int) -> float:
        """Share of the average that stays in optimiser step `step`, from 1."""
        return min(self.decay, step / (step + self.warmup))

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Ask the module for the copy. Raises ValueError when it has no place for one."""
        if not hasattr(pl_module, "averaged"):
            raise ValueError(f"EMA: {type(pl_module).__name__} has no attribute `averaged` and cannot be averaged")
        pl_module.keeps_ema = stage == "fit" or self.evaluate

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The loops are restored by now."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average, when this batch ended in an optimiser step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        update_average(pl_module.ema, getattr(pl_module, pl_module.averaged), self.decay_at(self._step))

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Put the average into the weights' place."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """And back."""
        self._swap(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the weights where they belong."""
        if self._swapped:
            self._swap(pl_module)

    def _swap(self, pl_module: Any) -> None:
        if not self.evaluate:
            return
        name = pl_module.averaged
        average = getattr(pl_module, name if self._swapped else "ema")
        weights = getattr(pl_module, "ema" if self._swapped else name)
        # FSDP2 leaves the outermost parameters gathered for a backward pass, which an average does not have: the next
        # evaluation would find them as they were in this one.
        for unit in average.modules() if self._swapped else ():
            if isinstance(unit, FSDPModule):
                unit.reshard()
        setattr(pl_module, name, weights if self._swapped else average)
        pl_module.ema = average if self._swapped else weights
        self._swapped = not self._swapped


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the average; what does not train and buffers are the model's."""
    trained = [(mean, value) for mean, value in zip(average.parameters(), model.parameters()) if value.requires_grad]
    means: list[torch.Tensor] = [mean for mean, _ in trained]
    values = [value.to(mean.dtype) for mean, value in trained]
    torch._foreach_lerp_(means, values, 1.0 - decay)
    for mean, value in zip(average.buffers(), model.buffers()):
        mean.copy_(value)
