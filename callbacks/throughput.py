"""How fast a transformer trains, and where the time goes: tokens per second, MFU, padding, waiting for data, memory.

    throughput/tokens_per_second     positions that are not padding, of all devices
    throughput/teraflops_per_device  FLOPs of the model (three forward passes, nothing computed again) per second and device
    throughput/mfu                   the same as a fraction of the device's peak
    throughput/padding               fraction of positions that are padding
    throughput/data_wait             fraction of the time spent waiting for the loader, on the device that waits most
    throughput/peak_memory_gib       most memory in use, on the device that uses most (CUDA)

Each is that of the steps since it was logged last, validation left out. FLOPs are those of `sequence.flops`: attention
counts the pairs that see each other, whatever the kernel computes. Counts stay on the device until they are logged.

Deliberately absent: synchronising in every step, which would slow down what is measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from nextflow.callbacks.device_peak import peak_of
from nextflow.callbacks.fsdp_sharding import FSDPSharding
from nextflow.sequence.flops import DecoderShape, FlopsModel, Work, visible_pairs
from nextflow.sequence.layout import PADDING, PackedRows

if TYPE_CHECKING:
    from nextflow.datamodules.batches import PackedBatch

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class Throughput(L.Callback):
    """Logs `throughput/...` every `trainer.log_every_n_steps` steps, for modules that train on PackedBatches.

    Needs a module with `config` (a transformer's) and `transformer`. `data_wait` needs the loaders of our DataModules.

    Args:
        peak_teraflops: of one device, in the numbers that it computes with. If not given, a known GPU that computes in 16 bits
            has that of its data sheet (`callbacks/device_peak.py`), and MFU is not logged for others.
    """

    def __init__(self, peak_teraflops: float | None = None) -> None:
        if peak_teraflops is not None and peak_teraflops <= 0:
            raise ValueError(f"Throughput.peak_teraflops must be positive, not {peak_teraflops}")
        self.peak_teraflops = peak_teraflops
        self._counts_5: Tensor | None = None
        self._started = self._paused_at = 0.0
        self._loader: Any = None
        self._waited_before = self._waited = 0.0
        self._logged_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._loader, self._logged_at = None, trainer.global_step
        self._restart(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let it go on."""
        self._started += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Count the batch; log where Lightning's loggers write."""
        if not isinstance(getattr(batch, "rows", None), PackedRows):
            raise ValueError(
                f"Throughput counts the rows of PackedBatches; this run's batches are {type(batch).__name__}"
            )
        counts_5 = _counts(batch.rows)
        self._counts_5 = counts_5 if self._counts_5 is None else self._counts_5 + counts_5
        self._add_waiting(trainer.train_dataloader)
        step, every = trainer.global_step, trainer.log_every_n_steps
        if step > self._logged_at and every and step % every == 0:  # with accumulation a step has several batches
            self._logged_at = step
            self._log(trainer, pl_module)

    def _add_waiting(self, loader: Any) -> None:
        if not hasattr(loader, "seconds_waited"):
            return
        if loader is not self._loader:  # stages of a curriculum have one each
            self._loader, self._waited_before = loader, 0.0
        self._waited += loader.seconds_waited - self._waited_before
        self._waited_before = loader.seconds_waited

    def _log(self, trainer: Any, pl_module: Any) -> None:
        assert self._counts_5 is not None
        reduce = trainer.strategy.reduce
        # Reading the sums waits for everything that was launched, so the clock is read behind it.
        positions, pairs, cells, targets, padding = reduce(self._counts_5, reduce_op="sum").tolist()
        seconds = time.perf_counter() - self._started
        work = Work(positions=positions, pairs=pairs, cells=cells, targets=targets)
        teraflops = self._flops(pl_module, work) / 1e12 / seconds / trainer.world_size
        values = {
            "tokens_per_second": positions / seconds,
            "teraflops_per_device": teraflops,
            "padding": padding / (positions + padding),
        }
        peak = self.peak_teraflops
        if peak is None and _compute_dtype(trainer) in SIXTEEN_BIT:
            peak = peak_of(pl_module.device)
        if peak is not None:
            values["mfu"] = teraflops / peak
        worst = {}
        if self._loader is not None:
            worst["data_wait"] = self._waited / seconds
        if pl_module.device.type == "cuda":
            worst["peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        for name, value in worst.items():
            values[name] = float(reduce(torch.tensor(value, device=pl_module.device), reduce_op="max"))
        pl_module.log_dict({f"throughput/{name}": value for name, value in values.items()})
        self._restart(pl_module)

    def _restart(self, pl_module: L.LightningModule) -> None:
        self._counts_5, self._waited = None, 0.0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._started = time.perf_counter()

    @staticmethod
    def _flops(pl_module: Any, work: Work) -> float:
        config = pl_module.config
        model = FlopsModel(
            shape=DecoderShape.of(config), vocabulary_size=config.vocabulary.size, code_dim=config.code_dim
        )
        trained = any(parameter.requires_grad for parameter in pl_module.transformer.blocks.parameters())
        return model.of_the_model(work, blocks_train=trained)


def _counts(rows: PackedRows) -> Tensor:
    """Positions, visible pairs, cells, targets, padding: int64 [5] on the device of the rows."""
    positions = (rows.document_BL != PADDING).sum()
    # Codes that are made on the fly are no targets yet, but have their weights.
    targets = (rows.weight_BL > 0).sum()
    pairs = visible_pairs(rows.document_BL, rows.block_BL)
    cells = torch.full_like(positions, rows.input_position_M.numel())
    return torch.stack((positions, pairs, cells, targets, rows.document_BL.numel() - positions))


def _compute_dtype(trainer: Any) -> torch.dtype:
    """What products are computed in: FSDP2's own type of gathered parameters, else that of `trainer.precision`."""
    for callback in trainer.callbacks:
        if isinstance(callback, FSDPSharding) and callback.precision.param_dtype is not None:
            return callback.precision.param_dtype
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(trainer.precision.split("-")[0], torch.float32)
