"""Prompts for generation: from a list in the config, a text file, or the captions or images of shards."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nextflow.datamodules.base import MAKE_CODES, MAKE_DOCUMENTS
from nextflow.datamodules.batches import Prompt, PromptBatch, RawImage
from nextflow.datamodules.images import caption_of, image_names
from nextflow.datamodules.pixels import decode_image, fit_image
from nextflow.datamodules.streams import find_shards
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import Shard, open_shard
from nextflow.sequence.text_tokenizer import load_text_tokenizer

Task = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class PromptItem:
    """One prompt of the config, where a plain string does not say enough."""

    prompt: str = ""
    """The text; for task "text" it stands behind the image, as a question."""
    level: int | None = None
    """Level of the generated image; `data.level` if not given."""
    aspect_ratio: float | None = None
    """Height / width; `data.aspect_ratio` if not given."""
    seed: int | None = None
    """Seed of its sampling; `data.seed` plus the prompt's index if not given."""
    image: str | None = None
    """Path of an image in front of the text."""


class PromptDataModule(L.LightningDataModule):
    """Prompts in batches, for `predict`, `test` and validation pictures."""

    def __init__(
        self,
        *,
        text_tokenizer: str,
        level: int,
        prompts: list[str | PromptItem] | None = None,
        prompt_file: str | None = None,
        shards: Mapping[str, str] | None = None,
        splits: list[str] | None = None,
        per_split: int | None = None,
        task: Task = "image",
        aspect_ratio: float = 1.0,
        schedule: ScaleSchedule = ScaleSchedule(),  # noqa: B008 (frozen)
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            text_tokenizer: local folder of a Hugging Face tokenizer.
            level: level of the images, generated or given.
            prompts: texts, or items with prompt, level, aspect_ratio, seed, image.
            prompt_file: text file with one prompt a line.
            shards: split -> glob pattern of shards whose captions (task image) or images (task text) are the prompts.
            splits: splits to take; all of `shards` if not given.
            per_split: how many of each split, drawn with `seed`; all if not given.
            task: generate an "image" or a "text".
            aspect_ratio: height / width of generated images.
            schedule: scale schedule.
            batch_size: prompts that are generated together.
            num_workers: loader processes.
            seed: prompt number i is sampled with seed + i, unless it names its own.
        """
        super().__init__()
        given = [
            name for name, value in (("prompts", prompts), ("prompt_file", prompt_file), ("shards", shards)) if value
        ]
        if len(given) != 1:
            raise ValueError(
                f"name exactly one of data.prompts, data.prompt_file and data.shards; given: {given or 'none'}"
            )
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be positive, not {batch_size}")
        self.schedule = schedule
        self.level = level
        self.aspect_ratio = aspect_ratio
        self.task: Task = task
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.prompts = prompts
        self.prompt_file = prompt_file
        self.shards = dict(shards or {})
        self.splits = list(self.shards) if splits is None else splits
        self.per_split = per_split
        self.text_tokenizer = load_text_tokenizer(text_tokenizer)
        self._check(level, aspect_ratio, "data")
        for index, item in enumerate(prompts or ()):
            if isinstance(item, PromptItem):
                self._check(item.level or level, item.aspect_ratio or aspect_ratio, f"data.prompts[{index}]")

    def predict_dataloader(self) -> DataLoader:
        """Every prompt once over all ranks, in order of its index."""
        rank, num_ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        data = _Prompts(self._sources()[rank::num_ranks], self)
        return DataLoader(data, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The same prompts."""
        return self.predict_dataloader()

    def test_dataloader(self) -> DataLoader:
        """The same prompts."""
        return self.predict_dataloader()

    def make(self, source: "_Source") -> Prompt:
        """Reads the image, if there is one, and encodes the text."""
        item = source.item
        level = item.level or self.level
        ratio = item.aspect_ratio or self.aspect_ratio
        segments: list[TextSegment | RawImage] = []
        if source.image is not None or item.image is not None:
            data = Path(item.image).read_bytes() if item.image is not None else source.read_image()
            try:
                image = decode_image(data)
                grids = self.schedule.grids(level, image.height / image.width)
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{source.where}: {item.image or source.image} cannot be used: {error}") from error
            if self.task == "text":
                ratio = image.height / image.width
            pixels_CHW = fit_image(image, self.schedule.pixels(level, image.height / image.width))
            segments.append(RawImage(pixels_CHW=pixels_CHW, grids=grids))
        elif self.task == "text":
            raise ValueError(
                f"{source.where}: task text needs an image; give `image`, or document shards in data.shards"
            )
        ids = [] if source.is_reference else self.text_tokenizer.encode(item.prompt)
        if ids:
            segments.append(TextSegment(ids=ids))
        height, width = self.schedule.base_grid(ratio)
        return Prompt(
            index=source.index,
            segments=tuple(segments),
            text=item.prompt,
            level=level,
            aspect_ratio=height / width,
            seed=self.seed + source.index if item.seed is None else item.seed,
            key=source.key or str(source.index),
            task=self.task,
            split=source.split,
            metadata=source.metadata,
        )

    def _sources(self) -> list["_Source"]:
        if self.shards:
            return self._sources_of_shards()
        if self.prompt_file is not None:
            path = Path(self.prompt_file)
            if not path.is_file():
                raise FileNotFoundError(f"data.prompt_file: there is no {path}")
            items: list[str | PromptItem] = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            if not items:
                raise ValueError(f"data.prompt_file: {path} holds no prompt")
        else:
            items = list(self.prompts or ())
        return [
            _Source(
                index=index,
                item=PromptItem(prompt=item) if isinstance(item, str) else item,
                where=f"data.prompts[{index}]" if self.prompt_file is None else f"{self.prompt_file}, prompt {index}",
            )
            for index, item in enumerate(items)
        ]

    def _sources_of_shards(self) -> list["_Source"]:
        sources: list[_Source] = []
        for split in self.splits:
            if split not in self.shards:
                raise ValueError(f"data.splits names {split!r}, but data.shards has {sorted(self.shards)}")
            pattern = self.shards[split].replace("{level}", str(self.level))
            how = MAKE_CODES if "{level}" in self.shards[split] else MAKE_DOCUMENTS
            shards = [open_shard(path) for path in find_shards(pattern, f"data.shards.{split}", how)]
            samples = [(shard, key) for shard in shards for key in shard.keys]
            # Shards are sorted by key: the first few would all be flags.
            random.Random(f"{self.seed}/{split}").shuffle(samples)
            for shard, key in samples[: self.per_split]:
                if self.task == "text" and shard.header.kind != "documents":
                    raise ValueError(f"data.shards.{split}: {shard.path} holds codes, task text needs document shards")
                sources.append(_source_of_sample(len(sources), shard, key, split, self.task))
        return sources

    def _check(self, level: int, aspect_ratio: float, where: str) -> None:
        for name, check in (
            ("level", lambda: self.schedule.num_scales(level)),
            ("aspect_ratio", self._ratio(aspect_ratio)),
        ):
            try:
                check()
            except ValueError as error:
                raise ValueError(f"{where}.{name}: {error}") from error

    def _ratio(self, aspect_ratio: float) -> Any:
        return lambda: self.schedule.base_grid(aspect_ratio)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A prompt before its image is read."""

    index: int
    item: PromptItem
    where: str
    key: str = ""
    split: str = "prompts"
    shard: Shard | None = None
    image: str | None = None
    is_reference: bool = False
    """The text is what the answer is compared with; the model does not see it."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def read_image(self) -> bytes:
        assert self.shard is not None and self.image is not None
        return self.shard.read(self.key, self.image)


def _source_of_sample(index: int, shard: Shard, key: str, split: str, task: Task) -> _Source:
    record = shard.record(key)
    return _Source(
        index=index,
        item=PromptItem(prompt=caption_of(record)),
        where=f"{shard.path}, key {key}",
        key=key,
        split=split,
        shard=shard,
        image=image_names(record)[0] if task == "text" else None,
        is_reference=task == "text",
        metadata=record.get("metadata", {}),
    )


class _Prompts(IterableDataset):
    def __init__(self, sources: list[_Source], owner: PromptDataModule):
        self.batches = [sources[start : start + owner.batch_size] for start in range(0, len(sources), owner.batch_size)]
        self.make = owner.make

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        for batch in self.batches[worker::num_workers]:
            yield PromptBatch(prompts=tuple(self.make(source) for source in batch))
