"""Several data types in one run: named sources with weights. Documents of different kinds share rows (NextFlow table 2).

    sources:
      drawings: {weight: 3, arrange: CaptionThenImage, shards: {train: codes/drawings/{level}/train/*.tar}}
      captions: {weight: 1, arrange: ImageThenCaption, shards: {train: codes/drawings/{level}/train/*.tar}}
      edits:
        weight: 2
        arrange: {class_path: SourceThenResult, init_args: {text_loss: false}}
        shards: {train: codes/edits/{level}/train/*.tar, validation: codes/edits/{level}/validation/*.tar}

A weight is the share of the source's documents. A stage of a curriculum may set other weights (`mixture` of its stages);
every source keeps its place in its own shards through all of them, and through a checkpoint.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nextflow.datamodules.arrangements import Arrangement, AsStored
from nextflow.datamodules.base import Recipe, Stage
from nextflow.datamodules.batches import PackedBatch
from nextflow.datamodules.mixing import MixedStream, SourceShards
from nextflow.datamodules.packed import PackedDataModule
from nextflow.datamodules.streams import SampleStream, ShardFolder


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture."""

    shards: Mapping[str, str]
    """Split -> glob pattern of document or token shards; `{level}` in it stands for the level."""
    weight: float = 1.0
    """Share of its documents, relative to the other sources; 0 leaves it to the stages of a curriculum."""
    arrange: Arrangement = AsStored()  # noqa: RUF009 (frozen)
    """How its documents are trained on: a class of `nextflow.datamodules.arrangements`, or one of your own."""


@dataclass(kw_only=True, eq=False, repr=False)
class MixtureDataModule(PackedDataModule):
    """Documents of several sources, packed together. Logs the share of each under `mixture/`."""

    shards: dict[str, str] = field(init=False)
    sources: Mapping[str, Source]
    """Sources by name. Their documents are read at the same level, with the same schedule and tokenizers."""

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            if source.weight < 0:
                raise ValueError(f"data.sources.{name}.weight must not be negative, but is {source.weight}")
            if " " in name:
                raise ValueError(f"data.sources: {name!r} holds a space; it is part of names in logs and states")
        # Which splits there are; what is read in them, each source says.
        self.shards = {split: "" for source in self.sources.values() for split in source.shards}
        super().__post_init__()
        self.open = ShardFolder(max_open=4 * self.window_shards * max(1, len(self.sources)))
        self._counted: dict[str, Counter[str]] = {"documents": Counter(), "positions": Counter()}
        self._logged_at: int | None = None

    def arrange(self) -> dict[str, Arrangement]:
        return {name: source.arrange for name, source in self.sources.items()}

    @property
    def source_names(self) -> list[str]:
        """Names that the `mixture` of a curriculum's stage may use."""
        return list(self.sources)

    def weights(self, stage: Stage | None) -> dict[str, float]:
        """Weights by source in a stage.

        Raises:
            ValueError: the stage names a source that does not exist, or no source has a weight.
        """
        if stage is None or stage.mixture is None:
            weights = {name: source.weight for name, source in self.sources.items()}
        else:
            unknown = sorted(set(stage.mixture) - set(self.sources))
            if unknown:
                raise ValueError(f"a stage's mixture names {unknown}, but data.sources has {self.source_names}")
            weights = {name: float(stage.mixture.get(name, 0)) for name in self.sources}
        if not any(weights.values()):
            raise ValueError("no source has a weight: set data.sources.NAME.weight, or `mixture` of the stage")
        return weights

    def training_recipe(self, stage: Stage | None) -> tuple[Recipe, str, int]:
        num_batches = self.batches_per_epoch if stage is None else stage.num_batches
        if num_batches is None:
            raise ValueError("a mixture has no end of its own: set data.batches_per_epoch, or stages of a curriculum")
        return self.recipe("train", stage, training=True), "mixture", num_batches

    def training_stream(self, pattern: str) -> Callable[..., SampleStream]:
        """Makes the mixed stream of this stage when it is called, in a loader's worker, with `slot` and `num_slots`."""
        level = self.recipe("train", self.stage).level
        shards = [
            SourceShards(name, place := self._place(name, "train", level), self.paths("train", place), weight)
            for name, weight in self.weights(self.stage).items()
            if weight > 0
        ]
        return partial(MixedStream, shards, self.open, seed=self.seed, window_shards=self.window_shards)

    def evaluation_recipes(self, split: str, predict: bool) -> list[tuple[Recipe, str]]:
        """The sources that have the split, behind each other."""
        self.pattern(split)
        stage = None if predict else self.stage
        recipes = {
            name: self.recipe(split, stage, source=name) for name in self.sources if split in self.sources[name].shards
        }
        return [(recipe, self._place(name, split, recipe.level)) for name, recipe in recipes.items()]

    def paths(self, split: str, pattern: str) -> list[Path]:
        """The shards of a source; `pattern` is its name and, where its shards depend on it, a space and the level."""
        name, _, level = pattern.partition(" ")
        template = self.sources[name].shards[split]
        return self.find(template.replace("{level}", level), template, f"data.sources.{name}.shards.{split}")

    def _place(self, name: str, split: str, level: int) -> str:
        """What a source reads in a split: it has a place of its own in the shards of every level."""
        shards = self.sources[name].shards
        if split not in shards:
            raise ValueError(f"data.sources.{name}.shards has no split {split!r}; it has {sorted(shards)}")
        return f"{name} {level}" if "{level}" in shards[split] else name

    # Shares.

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts training documents and positions by source, and logs their shares in this process every few steps."""
        if isinstance(batch, PackedBatch) and batch.state is not None:
            if self.trainer is not None:
                self._log_shares(self.trainer)
            for source, length in zip(batch.sources, batch.lengths):
                self._counted["documents"][source] += 1
                self._counted["positions"][source] += length
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def _log_shares(self, trainer: Any) -> None:
        step = trainer.global_step
        self._logged_at = step if self._logged_at is None else self._logged_at
        if step < self._logged_at + trainer.log_every_n_steps:
            return
        self._logged_at = step
        shares = {
            f"mixture/{what}/{name}": counts[name] / max(1, counts.total())
            for what, counts in self._counted.items()
            for name in self.sources
        }
        for logger in trainer.loggers:
            logger.log_metrics(shares, step=step)
        for counts in self._counted.values():
            counts.clear()
