"""Resuming where the data cannot be taken up at the same sample: on another number of processes or loader workers."""

from __future__ import annotations

from typing import Any

import lightning as L


class RestartData(L.Callback):
    """Lets a resumed run begin its data anew; without it such a run is refused.

    Weights, optimiser, average and step go on exactly. The documents are shuffled from the start, so give another `data.seed`
    with it, or the run meets those that it has seen in the order in which it saw them.

        python main.py fit -c CONFIG --ckpt_path last --trainer.callbacks+=nextflow.callbacks.restart_data.RestartData \\
            --data.seed 1
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the DataModule. Raises ValueError when it knows no positions."""
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "restart"):
            raise ValueError(f"RestartData needs a DataModule of nextflow.datamodules, not {type(data).__name__}")
        data.restart = True
