"""Writes the final metrics of a run as one JSON file, for tables and comparisons without an event file reader."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L


class MetricsWriter(L.Callback):
    """Writes what was logged last at the end of fit; validate and test add theirs to the file, and fast_dev_run nothing."""

    def __init__(self, output: str | None = None) -> None:
        """
        Args:
            output: the JSON file, metrics.json in the logger's folder if not given. Fit replaces it, validate and test
                update it.
        """
        self.output = None if output is None else Path(output)
        self._started = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics of training and of its last validation; a resumed run that was over has none and keeps the file."""
        seconds = time.perf_counter() - self._started
        self._write(trainer, False, {"fit/seconds": seconds, "fit/steps": trainer.global_step})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the metrics of `validate`; validation inside of fit is written at its end."""
        if trainer.state.fn == "validate":
            self._write(trainer, True, {})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the metrics of `test`."""
        self._write(trainer, True, {})

    def _write(self, trainer: Any, keep: bool, extra: dict[str, float]) -> None:
        # On all processes: they agree on log_dir by a broadcast.
        output = self.output or Path(trainer.log_dir or trainer.default_root_dir) / "metrics.json"
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        existing: dict[str, float] = json.loads(output.read_text()) if keep and output.is_file() else {}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.partial")
        partial.write_text(json.dumps({**existing, **metrics, **extra}, indent=1, sort_keys=True) + "\n")
        os.replace(partial, output)
