"""What all DataModules share: finding and checking shards, loaders, and exact resume.

Exact resume. Lightning saves the state of rank 0's loader only, and one batch too far if it prefetches. Here every training
batch carries the position that follows it; `on_after_batch_transfer` takes it off when the batch is really consumed, and the
positions of all ranks are saved with the checkpoint. Nothing depends on how far loader workers have read ahead.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nextflow.datamodules.batches import ImageBatch, PackedBatch, StreamState
from nextflow.datamodules.loader import WaitedLoader
from nextflow.datamodules.streams import (
    Assembler,
    Health,
    Sample,
    SampleStream,
    ShardFolder,
    ShuffledStream,
    evaluation_batches,
    find_shards,
    train_batches,
)
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import check_header

# Evaluation batches are made inside chunks of this many batches, so that buckets of aspect ratio can fill up.
CHUNK_BATCHES = 8
MAKE_DOCUMENTS = (
    "`python -m nextflow.datamodules.openmoji --config configs/quickstart/1_data.yaml` (or datamodules.documents)"
)
MAKE_CODES = (
    "run `predict` with a trained tokenizer and the callback CodeWriter, as configs/quickstart/6_codes.yaml does"
)


class Stage(Protocol):
    """One stage of a curriculum; one stage is one epoch (see `callbacks/resolution_curriculum.py`)."""

    level: int
    alpha: float
    num_batches: int
    batch_size: int | None
    budget: int | None
    mixture: Mapping[str, float] | None
    """Weights by source name, for `MixtureDataModule`; None keeps those of its sources."""


class Recipe(Protocol):
    """How samples of one split and level become batches."""

    def read(self, sample: Sample) -> Any:
        """Reads one sample; ValueError, KeyError or OSError if it is broken."""

    def assembler(self) -> Assembler[Any, Any]:
        """An empty assembler."""


class ShardDataModule(L.LightningDataModule):
    """A DataModule over tar shards. Subclasses say with a `Recipe` how samples become batches."""

    shards_key = "shards"
    """The argument that names the data, for messages."""

    def __init__(
        self,
        *,
        shards: Mapping[str, str],
        schedule: ScaleSchedule,
        batch_size: int,
        batches_per_epoch: int | None,
        validation_splits: list[str],
        test_splits: list[str],
        predict_splits: list[str] | None,
        window_shards: int,
        num_workers: int,
        seed: int,
        max_bad_fraction: float,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be positive, not {batch_size}")
        if window_shards < 1:
            raise ValueError(f"data.window_shards must be positive, not {window_shards}")
        self.shards = dict(shards)
        self.schedule = schedule
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.validation_splits = validation_splits
        self.test_splits = test_splits
        self.predict_splits = predict_splits
        self.window_shards = window_shards
        self.num_workers = num_workers
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.stages: list[Stage] | None = None
        self.restart = False  # set by the callback RestartData
        self.open = ShardFolder(max_open=4 * window_shards)
        self._at: dict[str, dict[str, Any]] = {}

    # What subclasses fill in.

    @abstractmethod
    def training_recipe(self, stage: Stage | None) -> tuple[Recipe, str, int]:
        """Recipe of the training split, the glob pattern it reads, and the number of batches of an epoch."""

    @abstractmethod
    def evaluation_recipes(self, split: str, predict: bool) -> list[tuple[Recipe, str]]:
        """Recipes over one split and the glob patterns they read: several if the split is seen at several levels."""

    # Loaders.

    @property
    def stage(self) -> Stage | None:
        """The curriculum's stage of this epoch, the last one after training; None without a curriculum."""
        if not self.stages:
            return None
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return self.stages[min(epoch, len(self.stages) - 1)]

    def train_dataloader(self) -> DataLoader:
        """The batches of one epoch, from where the last one stopped."""
        recipe, pattern, num_batches = self.training_recipe(self.stage)
        place = self._at.setdefault(pattern, {"next": 0, "slots": {}})
        data = _TrainingData(self, recipe, self.training_stream(pattern), pattern, place, num_batches)
        # Safe here: the workers' shares of an epoch add up to its length.
        warnings.filterwarnings("ignore", message=r"Your `IterableDataset` has `__len__` defined")
        return self._loader(data)

    def val_dataloader(self) -> DataLoader | list:
        """The splits `validation_splits` behind each other; `batch.split` names them."""
        default = self.validation_splits == ["validation"] and "validation" not in self.shards
        return self._evaluation_loader([] if default else self.validation_splits)

    def test_dataloader(self) -> DataLoader | list:
        """The splits `test_splits`."""
        return self._evaluation_loader(self.test_splits)

    def predict_dataloader(self) -> DataLoader | list:
        """The splits `predict_splits`, each sample exactly once over all ranks."""
        splits = list(self.shards) if self.predict_splits is None else self.predict_splits
        return self._evaluation_loader(splits, predict=True)

    def _evaluation_loader(self, splits: list[str], predict: bool = False) -> DataLoader | list:
        parts = [
            (recipe, self._samples_of_rank(split, pattern, predict))
            for split in splits
            for recipe, pattern in self.evaluation_recipes(split, predict)
        ]
        return self._loader(_EvaluationData(self, parts)) if parts else []

    def _loader(self, data: IterableDataset) -> DataLoader:
        return WaitedLoader(data, batch_size=None, num_workers=self.num_workers)

    def training_stream(self, pattern: str) -> Callable[..., SampleStream]:
        """Makes a stream over the shards of a pattern when it is called, in a loader's worker, with `slot` and `num_slots`."""
        paths = self.paths("train", pattern)
        return partial(ShuffledStream, paths, self.open, seed=self.seed, window_shards=self.window_shards)

    @staticmethod
    def pieces(sample: Sample) -> list[Sample]:
        """What is read of a sample in evaluation: all of it at once, or its images one by one."""
        return [sample]

    # Shards.

    def pattern(self, split: str) -> str:
        """The glob pattern of a split.

        Raises:
            ValueError: `shards` has no such split.
        """
        if split not in self.shards:
            raise ValueError(f"data.{self.shards_key} has no split {split!r}; it has {sorted(self.shards)}")
        return self.shards[split]

    def source_files(self, split: str) -> list[Path]:
        """The files that a split is read from: with equal names, sizes and times two runs read the same."""
        return sorted(Path(path) for path in glob(self.pattern(split), recursive=True))

    def paths(self, split: str, pattern: str) -> list[Path]:
        """The shards of a pattern; the header of each is checked against this run when it is opened."""
        return self.find(pattern, self.pattern(split), f"data.shards.{split}")

    def find(self, pattern: str, template: str, key: str) -> list[Path]:
        """The shards of a pattern; `template` is the pattern as it stands in the config, at `key`."""
        paths = find_shards(pattern, key, MAKE_CODES if "{level}" in template else MAKE_DOCUMENTS)
        self.open.check = partial(check_header, schedule=self.schedule, fingerprint=self._fingerprint_of_module())
        self.open(paths[0])
        return paths

    @property
    def rank(self) -> tuple[int, int]:
        """This process' number, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _fingerprint_of_module(self) -> str | None:
        module = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        tokenizer = getattr(module, "tokenizer", None)
        return tokenizer.fingerprint() if tokenizer is not None and hasattr(tokenizer, "fingerprint") else None

    def _samples_of_rank(self, split: str, pattern: str, predict: bool) -> list[Sample]:
        rank, num_ranks = self.rank
        shards = [self.open(path) for path in self.paths(split, pattern)]
        samples = [Sample(shard, key, 0) for shard in shards for key in shard.keys]
        if not predict and num_ranks > 1:
            # All ranks evaluate equally many, as collectives need; predict must not write a sample twice.
            samples += (samples * num_ranks)[: -len(samples) % num_ranks]
        return samples[rank::num_ranks]

    # Exact resume.

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes where the stream stands behind this batch, and takes the note off."""
        if not isinstance(batch, (ImageBatch, PackedBatch)) or batch.state is None:
            return batch
        slot, num_slots, source, position = batch.state
        place = self._at[source]
        place["next"] = (slot + 1) % num_slots
        place["slots"][slot] = position
        return replace(batch, state=None)

    def state_dict(self) -> dict[str, Any]:
        """Positions of all ranks; called on all of them."""
        ranks: list[Any] = [self._at]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, self._at)
        return {"num_workers": max(1, self.num_workers), "seed": self.seed, "ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint stood. Evaluation and `predict` begin at the beginning, on any number of processes.

        Raises:
            ValueError: another number of processes or loader workers, or another seed.
        """
        if self.restart or (self.trainer is not None and self.trainer.state.fn != "fit"):
            return
        rank, num_ranks = self.rank
        for name, saved, now in (
            ("trainer.devices x trainer.num_nodes", len(state_dict["ranks"]), num_ranks),
            ("data.num_workers", state_dict["num_workers"], max(1, self.num_workers)),
            ("data.seed", state_dict["seed"], self.seed),
        ):
            if saved != now:
                raise ValueError(
                    f"the checkpoint was made with {name} = {saved}, this run has {now}: the data cannot be taken up at the "
                    "same sample. Use the same value, or let the data begin anew: "
                    "--trainer.callbacks+=nextflow.callbacks.restart_data.RestartData, with another --data.seed."
                )
        # Lightning looks for a resumable loader; here the DataModule itself goes on at the same sample.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        # In place: a loader that was built already holds on to these.
        for source, place in state_dict["ranks"][rank].items():
            self._at.setdefault(source, {}).update(place)


class _TrainingData(IterableDataset):
    def __init__(
        self,
        owner: ShardDataModule,
        recipe: Recipe,
        make_stream: Callable[..., SampleStream],
        source: str,
        place: dict[str, Any],
        num_batches: int,
    ):
        self.recipe, self.make_stream, self.source = recipe, make_stream, source
        self.place, self.num_batches = place, num_batches
        self.rank, self.max_bad_fraction = owner.rank, owner.max_bad_fraction

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        worker, num_slots = _worker()
        # The batch after the last consumed one comes first, whichever worker made it then.
        slot = (worker + self.place["next"]) % num_slots
        rank, num_ranks = self.rank
        stream = self.make_stream(slot=rank * num_slots + slot, num_slots=num_ranks * num_slots)
        position = self.place["slots"].get(slot)
        health = Health(self.max_bad_fraction)
        batches = train_batches(stream, self.recipe.read, self.recipe.assembler(), health, position)
        share = len(range(worker, self.num_batches, num_slots))
        for batch, after in islice(batches, share):
            yield replace(batch, state=StreamState(slot, num_slots, self.source, after))


class _EvaluationData(IterableDataset):
    def __init__(self, owner: ShardDataModule, parts: list[tuple[Recipe, list[Sample]]]):
        self.parts = parts
        self.pieces = owner.pieces
        self.chunk = CHUNK_BATCHES * owner.batch_size
        self.max_bad_fraction = owner.max_bad_fraction

    def __iter__(self) -> Iterator[Any]:
        worker, num_workers = _worker()
        for recipe, samples in self.parts:
            yield from evaluation_batches(
                samples,
                recipe.read,
                recipe.assembler(),
                Health(self.max_bad_fraction),
                chunk=self.chunk,
                pieces=self.pieces,
                worker=worker,
                num_workers=num_workers,
            )


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
