"""Scale dropout (NextFlow section 3.1: "randomly dropping 50% of the VAR scales" makes codebook and reconstruction robust).

The paper gives no sampling rule. Here each scale but the first is dropped independently. The draw is a function of the
seed and the step alone, equal on all ranks, so an interrupted run continues as a straight one.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


class ScaleDropout(L.Callback):
    """Before each training batch sets `pl_module.scale_keep`: for each scale of the batch whether it is used.

    Needs a module with the attribute `scale_keep` and batches with `grids` (one per scale).

    Args:
        share: probability with which each scale but the first is dropped, in batches with dropout.
        probability: share of batches with dropout, once it is fully on.
        start_step: first step with dropout.
        ramp_steps: steps over which the share of batches rises from 0 to `probability`.
        stop_step: step from which no scale is dropped any more; null is never.
        seed: of the draws.
    """

    def __init__(
        self,
        share: float = 0.5,
        probability: float = 1.0,
        start_step: int = 0,
        ramp_steps: int = 0,
        stop_step: int | None = None,
        seed: int = 0,
    ) -> None:
        if not (0 <= share <= 1 and 0 <= probability <= 1):
            raise ValueError(f"ScaleDropout: share {share} and probability {probability} must lie between 0 and 1")
        self.share, self.probability, self.seed = share, probability, seed
        self.start_step, self.ramp_steps, self.stop_step = start_step, ramp_steps, stop_step

    def probability_at(self, step: int) -> float:
        """Share of batches with dropout at `step`."""
        if step < self.start_step or (self.stop_step is not None and step >= self.stop_step):
            return 0.0
        return self.probability * min(1.0, (step - self.start_step + 1) / max(1, self.ramp_steps))

    def keep_at(self, step: int, num_scales: int) -> tuple[bool, ...] | None:
        """For each scale whether it is used at `step`; None = all are."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)  # 32 bits count
        draws = torch.rand(num_scales, generator=generator).tolist()
        if draws[0] >= self.probability_at(step):  # the first scale is never dropped: its draw decides for the batch
            return None
        return (True, *(draw >= self.share for draw in draws[1:]))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.scale_keep = self.keep_at(trainer.global_step, len(batch.grids))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.scale_keep = None
