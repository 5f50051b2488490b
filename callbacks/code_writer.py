"""Writes the codes that a `TokenizerModule` predicts as token shards: `<output>/<level>/<split>/000000.tar`, ...

Of several processes each writes its own documents beside those of the others, as `000000-rank0of2.tar` and so on, so that
`<output>/<level>/<split>/*.tar` is the whole data set however many made it.

A second run with the same tokenizer, schedule, correction and data (names, sizes and times of its shards) finds
`<output>/_complete.json` and does nothing. A run that was cut off leaves no such file and is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from nextflow.sequence.shards import Codes, ShardHeader, ShardWriter, encode_codes

COMPLETE = "_complete.json"


class CodeWriter(BasePredictionWriter):
    """Collects the images of each document and writes the document once all of them have codes.

    Needs a module with `tokenizer` (`schedule`, `fingerprint()`) whose predictions have the fields of `CodeBatch`:
    keys, names, records, codes_BN, corrected, grids, level, aspect_ratio, split. Codes under self-correction (`corrected`,
    where the module's `correction` is set) are stored beside the plain ones.

    Args:
        output: folder to write to.
        samples_per_shard: documents per shard.
        text: where the data comes from and under which licence, written into each shard.
    """

    def __init__(self, output: str, samples_per_shard: int = 4096, text: str = "") -> None:
        super().__init__(write_interval="batch")
        self.output, self.samples_per_shard, self.text = Path(output), samples_per_shard, text
        self._writers: dict[tuple[int, str], ShardWriter] = {}
        self._waiting: dict[tuple[int, str, str], dict[str, bytes]] = {}
        self._run: dict[str, Any] = {}
        self._done = False

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        tokenizer = pl_module.tokenizer
        self._writers, self._waiting = {}, {}
        self._header = ShardHeader(
            kind="codes", schedule=tokenizer.schedule.to_dict(), tokenizer=tokenizer.fingerprint(), text=self.text
        )
        self._run = {
            "tokenizer": self._header.tokenizer,
            "schedule": tokenizer.schedule.fingerprint(),
            "correction": str(getattr(pl_module, "correction", None)),
            "data": _data_of(getattr(trainer, "datamodule", None)),
            "limit": str(trainer.limit_predict_batches),
            "processes": trainer.world_size,
        }
        marker = self.output / COMPLETE
        known = self._run["data"] is not None
        self._done = known and marker.is_file() and json.loads(marker.read_text())["run"] == self._run
        trainer.strategy.barrier()  # nobody removes the marker before everybody has read it
        if self._done:
            rank_zero_info(
                f"{self.output} already holds the codes of tokenizer {self._header.tokenizer}; nothing to do"
            )
        elif trainer.is_global_zero:
            marker.unlink(missing_ok=True)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._done:
            raise StopIteration  # Lightning's prediction loop ends on it, as on an exhausted loader

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        schedule = pl_module.tokenizer.schedule
        if prediction.grids != schedule.grids(prediction.level, prediction.aspect_ratio):
            raise ValueError(
                f"a token shard holds images of the schedule's levels and ratios, but {prediction.keys[0]} has the last grid "
                f"{prediction.grids[-1]}: set data.resolution to buckets"
            )
        base_grid = schedule.base_grid(prediction.aspect_ratio)
        for row, (key, name, record) in enumerate(zip(prediction.keys, prediction.names, prediction.records)):
            corrected = prediction.corrected
            codes = Codes(
                prediction.codes_BN[row].numpy(),
                prediction.level,
                base_grid,
                None if corrected is None else corrected.input_N[row].numpy(),
                None if corrected is None else corrected.target_N[row].numpy(),
            )
            waiting = self._waiting.setdefault((prediction.level, prediction.split, key), {})
            waiting[f"{name.split('.')[0]}.npz"] = encode_codes(codes)
            if len(waiting) == sum("image" in segment for segment in record["segments"]):
                writer = self._writer(trainer, prediction.level, prediction.split)
                writer.write(key, record, self._waiting.pop((prediction.level, prediction.split, key)))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._done:
            return
        for writer in self._writers.values():
            writer.close()
        counts = _sum_of_ranks({name: writer.num_samples for name, writer in self._writers.items()})
        for level, split in counts:
            folder = self.output / str(level) / split
            if (level, split) not in self._writers:  # this process got none of it now, but may have had some last time
                _remove_old_shards(trainer, folder)
            rank_zero_info(f"wrote codes of {counts[level, split]} documents to {folder}")
        if self._waiting:
            rank_zero_info(f"left out {len(self._waiting)} documents of which not all images could be read")
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / COMPLETE).write_text(json.dumps({"run": self._run}, indent=2))

    def _writer(self, trainer: L.Trainer, level: int, split: str) -> ShardWriter:
        if (level, split) not in self._writers:
            folder = self.output / str(level) / split
            _remove_old_shards(trainer, folder)
            self._writers[level, split] = ShardWriter(
                folder,
                header=self._header,
                samples_per_shard=self.samples_per_shard,
                suffix=_suffix(trainer.global_rank, trainer.world_size),
            )
        return self._writers[level, split]


def _suffix(rank: int, num_ranks: int) -> str:
    return f"-rank{rank}of{num_ranks}" if num_ranks > 1 else ""


def _remove_old_shards(trainer: L.Trainer, folder: Path) -> None:
    """Removes what earlier runs left, but no shard that another process of this run may just have written: that is its own."""
    others = {_suffix(rank, trainer.world_size) for rank in range(trainer.world_size) if rank != trainer.global_rank}
    for path in folder.glob("[0-9]*.tar"):
        if path.stem[len("000000") :] not in others:
            path.unlink(missing_ok=True)


def _sum_of_ranks(counts: dict[tuple[int, str], int]) -> Counter[tuple[int, str]]:
    parts: list[Any] = [counts]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, counts)
    return sum(map(Counter, parts), Counter())


def _data_of(datamodule: Any) -> dict[str, Any] | None:
    """What a DataModule with `shards` and `source_files` would read; None, never taken for equal, for other data."""
    if datamodule is None or not hasattr(datamodule, "source_files"):
        return None
    files = [path for split in datamodule.shards for path in datamodule.source_files(split)]
    states = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {
        "levels": list(getattr(datamodule, "levels", [])),
        "splits": getattr(datamodule, "predict_splits", None) or list(datamodule.shards),
        "files": len(files),
        "state": hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16],
    }
