"""Writes the codes that a `TokenizerModule` predicts as token shards: `<output>/<level>/<split>/000000.tar`, ...

A second run with the same tokenizer, schedule, correction and data (names, sizes and times of its shards) finds
`<output>/_complete.json` and does nothing. A run that was cut off leaves no such file and is done again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from nextflow.sequence.shards import Codes, ShardHeader, ShardWriter, encode_codes

COMPLETE = "_complete.json"


class CodeWriter(BasePredictionWriter):
    """Collects the images of each document and writes the document once all of them have codes.

    Needs a module with `tokenizer` (`schedule`, `fingerprint()`) whose predictions have the fields of `CodeBatch`:
    keys, names, records, codes_BN, input_codes_BN, level, aspect_ratio, split. Several processes write to
    `<output>/<level>/<split>/rank_0/` and so on.

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
        base_grid = pl_module.tokenizer.schedule.base_grid(prediction.aspect_ratio)
        for row, (key, name, record) in enumerate(zip(prediction.keys, prediction.names, prediction.records)):
            fed = None if prediction.input_codes_BN is None else prediction.input_codes_BN[row].numpy()
            codes = Codes(prediction.codes_BN[row].numpy(), fed, prediction.level, base_grid)
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
            rank_zero_info(
                f"wrote codes of {writer.num_samples} documents to {writer.folder} ({len(writer.paths)} shards)"
            )
        if self._waiting:
            rank_zero_info(f"left out {len(self._waiting)} documents of which not all images could be read")
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / COMPLETE).write_text(json.dumps({"run": self._run}, indent=2))

    def _writer(self, trainer: L.Trainer, level: int, split: str) -> ShardWriter:
        if (level, split) not in self._writers:
            folder = self.output / str(level) / split
            if trainer.world_size > 1:
                folder = folder / f"rank_{trainer.global_rank}"
            for old in folder.glob("[0-9]*.tar"):  # of an earlier run: with more shards than this one, some would stay
                old.unlink()
            self._writers[level, split] = ShardWriter(
                folder, header=self._header, samples_per_shard=self.samples_per_shard
            )
        return self._writers[level, split]


def _data_of(datamodule: Any) -> dict[str, Any] | None:
    """What a DataModule with `shards` (split -> glob pattern) would read; None, never taken for equal, for other data."""
    if datamodule is None or not hasattr(datamodule, "shards"):
        return None
    files = [Path(path) for pattern in datamodule.shards.values() for path in sorted(glob(pattern, recursive=True))]
    return {
        "levels": list(getattr(datamodule, "levels", [])),
        "splits": getattr(datamodule, "predict_splits", None) or list(datamodule.shards),
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
