"""Self-correction while the transformer trains: it is fed codes with errors and learns to repair them (NextFlow 2.2, 3.2.1).

The paper corrupts 60 % of the codes of every scale, in all training samples, and gives neither k nor the temperature. Here all
four are functions of the step. Images come as pixels: then the frozen tokenizer draws. Or they come as token shards that hold
corrected codes (`model.correction` of the tokenizer when it writes them): then `probability` alone counts, and decides image
by image which of the stored codes are used. Validation is never corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L

from nextflow.sequence.correction import Correction
from nextflow.sequence.draws import seed_of


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A number that moves in a straight line over some steps, and rests before and behind them."""

    start: float
    """Value up to `first_step`."""
    end: float
    """Value from `first_step + num_steps` on."""
    first_step: int = 0
    """Optimiser step at which it begins to move."""
    num_steps: int = 1
    """Steps that it takes."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"SelfCorrection: num_steps of a ramp must be at least 1, got {self.num_steps}")

    def at(self, step: int) -> float:
        """The value at an optimiser step."""
        progress = min(1.0, max(0.0, (step - self.first_step) / self.num_steps))
        return self.start + (self.end - self.start) * progress


class SelfCorrection(L.Callback):
    """Before each training batch sets `pl_module.correction`, and takes it away behind the batch.

    Each argument is a number, or a ramp: `{start: 0, end: 0.6, first_step: 1000, num_steps: 2000}`. An image's draws are a
    function of seed, step and image. The module logs `train/corrected_codes`, the share of codes that are fed as another one.

    Args:
        probability: share of the images (of those that are trained on) that are corrected; 0 is off.
        fraction: share of the positions of each scale that are drawn; with pixels alone.
        top_k: number of nearest entries that are drawn among; with pixels alone.
        temperature: of softmax(-distance / temperature); with pixels alone.
        seed: of the draws.
    """

    def __init__(
        self,
        probability: float | Ramp = 1.0,
        fraction: float | Ramp = 0.6,
        top_k: int | Ramp = 10,
        temperature: float | Ramp = 1.0,
        seed: int = 0,
    ) -> None:
        self.probability, self.fraction, self.top_k, self.temperature = probability, fraction, top_k, temperature
        self.seed = seed
        for ramp in (probability, fraction, top_k, temperature):  # a mistake in any of them ends the run here
            for step in (0, ramp.first_step + ramp.num_steps) if isinstance(ramp, Ramp) else (0,):
                self.correction_at(step)

    def correction_at(self, step: int) -> Correction | None:
        """What holds at an optimiser step; None while no image is corrected."""
        correction = Correction(
            probability=_at(self.probability, step),
            fraction=_at(self.fraction, step),
            top_k=round(_at(self.top_k, step)),
            temperature=_at(self.temperature, step),
            seed=seed_of(self.seed, step),
        )
        return correction if correction.probability > 0 else None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if not hasattr(pl_module, "correction"):
            raise ValueError(
                f"SelfCorrection needs a module with the attribute `correction`, not {type(pl_module).__name__}"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.correction = self.correction_at(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.correction = None


def _at(value: float | Ramp, step: int) -> float:
    return value.at(step) if isinstance(value, Ramp) else value
