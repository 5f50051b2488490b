"""Prompts of several kinds one after another, for `test`: what a suite of tasks is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
from torch.utils.data import ChainDataset, DataLoader

from nextflow.datamodules.prompt_sources import Task
from nextflow.datamodules.prompts import PromptDataModule
from nextflow.sequence.scales import ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class SuitePart:
    """Prompts of one kind."""

    shards: dict[str, str]
    """Split -> glob pattern of document shards."""
    task: Task = "image"
    """What is generated, and so what of each document is the prompt (`PromptDataModule`)."""
    per_split: int | None = None
    """How many of each split; `data.per_split` if not given."""


class SuiteDataModule(L.LightningDataModule):
    """The prompts of all kinds, each batch of one kind."""

    def __init__(
        self,
        *,
        parts: Mapping[str, SuitePart],
        text_tokenizer: str,
        level: int,
        per_split: int | None = None,
        schedule: ScaleSchedule = ScaleSchedule(),  # noqa: B008 (frozen)
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            parts: kind -> where its prompts come from. The kind says how answers are scored.
            text_tokenizer: local folder of a Hugging Face tokenizer.
            level: level of the images, generated or given.
            per_split: how many of each split and kind, drawn with `seed`; all if not given.
            schedule: scale schedule.
            batch_size: prompts that are generated together.
            num_workers: loader processes.
            seed: prompt number i of a kind is sampled with seed + i.
        """
        super().__init__()
        if not parts:
            raise ValueError("data.parts names no kind of prompts")
        self.level, self.schedule = level, schedule
        self.parts = {
            kind: PromptDataModule(
                text_tokenizer=text_tokenizer,
                level=level,
                shards=part.shards,
                per_split=per_split if part.per_split is None else part.per_split,
                task=part.task,
                schedule=schedule,
                batch_size=batch_size,
                num_workers=num_workers,
                seed=seed,
                kind=kind,
            )
            for kind, part in parts.items()
        }
        self.text_tokenizer = next(iter(self.parts.values())).text_tokenizer

    def test_dataloader(self) -> DataLoader:
        """Every prompt once over all ranks."""
        for part in self.parts.values():
            part.trainer = self.trainer  # it knows the ranks
        loaders = [part.test_dataloader() for part in self.parts.values()]
        workers = loaders[0].num_workers
        return DataLoader(ChainDataset([loader.dataset for loader in loaders]), batch_size=None, num_workers=workers)
