"""A run that something happens to: `python interrupted_run.py FOLDER WHAT`, for `test_interruptions.py`.

The weights count the optimiser steps. FOLDER/ready appears behind the checkpoint of step 2.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from nextflow.callbacks.last_checkpoint import LastCheckpoint


class Counting(L.LightningModule):
    def __init__(self, what):
        super().__init__()
        self.what, self.layer = what, torch.nn.Linear(300, 300, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        if self.global_step == 3:
            for number in {"sigterm": [signal.SIGTERM], "ctrl-c": [signal.SIGINT], "twice": [signal.SIGINT] * 2}.get(
                self.what, []
            ):
                os.kill(os.getpid(), number)
            if self.what == "full":  # no file may grow beyond 100 kB: the next checkpoint cannot be written
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return -self.layer(torch.ones(1, 300)).sum()

    def on_save_checkpoint(self, checkpoint):
        if self.global_step == 4 and self.what == "kill":
            checkpoint["slow"] = Slow()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Slow:
    """Is written when half of the file is there, and never ends."""

    def __reduce__(self):
        Path(sys.argv[1], "ready").touch()
        time.sleep(600)
        return int, ()


def main(folder, what, shards=False, resume=None, max_steps=6):
    strategy = ModelParallelStrategy(1, 1, save_distributed_checkpoint=True) if shards else "auto"
    trainer = L.Trainer(
        max_steps=max_steps, max_epochs=-1, callbacks=[LastCheckpoint(folder, every_n_train_steps=2)], logger=False,
        accelerator="cpu", devices=1, strategy=strategy, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Counting(what)
    trainer.fit(module, torch.utils.data.DataLoader(range(100), batch_size=None), ckpt_path=resume, weights_only=False)
    return trainer.global_step


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests themselves run in the background
    main(sys.argv[1], sys.argv[2], shards="shards" in sys.argv[3:])
