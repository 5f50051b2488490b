"""Prompts for generation: from a list in the config, a text file, or the documents of shards.

`fit` gets them without end, each pass in an order of its own; sample i of that stream is drawn with seed + i, and where the
stream stands is one number, the batches consumed. `predict`, `test` and validation get each prompt once, in order.
"""

import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nextflow.datamodules.base import MAKE_CODES, MAKE_DOCUMENTS
from nextflow.datamodules.batches import Prompt, PromptBatch, RawImage
from nextflow.datamodules.pixels import decode_image, fit_image
from nextflow.datamodules.prompt_sources import PromptItem, PromptSource, Task, not_too_long, source_of_sample
from nextflow.datamodules.streams import find_shards
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import open_shard
from nextflow.sequence.text_tokenizer import load_text_tokenizer


class PromptDataModule(L.LightningDataModule):
    """Prompts in batches, for `predict`, `test`, validation pictures and policy optimisation."""

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
        train_split: str = "train",
        task: Task = "image",
        aspect_ratio: float | None = None,
        max_prompt_length: int | None = None,
        schedule: ScaleSchedule = ScaleSchedule(),  # noqa: B008 (frozen)
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        kind: str = "",
    ):
        """
        Args:
            text_tokenizer: local folder of a Hugging Face tokenizer.
            level: level of the images, generated or given.
            prompts: texts, or items with prompt, level, aspect_ratio, seed, image.
            prompt_file: text file with one prompt a line.
            shards: split -> glob pattern of shards whose documents are the prompts. Task image: what stands in front of their
                last image, a caption, or sources and instruction of an edit; that image is the known result. Task text: their
                segments without loss, a picture and a question, or their first image where there are none. Task reasoning:
                their segments without loss. Task interleaved: what is in front of their first image.
            splits: splits to take outside of `fit`; all of `shards` if not given.
            per_split: how many of each split, drawn with `seed`, outside of `fit`; all if not given.
            train_split: split of `shards` that `fit` takes.
            task: generate an "image", a "text", with "reasoning" a text and then an image, or with "interleaved" both in turn.
            aspect_ratio: height / width of generated images; if not given that of the document's own, and 1 without one.
            max_prompt_length: most text ids of a prompt. Longer documents of shards are left out with a warning, which
                bounds the memory of roll-outs; a longer prompt of `prompts` or `prompt_file` is refused. Not given: any length.
            schedule: scale schedule.
            batch_size: prompts that are generated together.
            num_workers: loader processes.
            seed: prompt number i is sampled with seed + i, unless it names its own.
            kind: name of these prompts, where there are several kinds (`SuiteDataModule`).
        """
        super().__init__()
        given = [
            name for name, value in (("prompts", prompts), ("prompt_file", prompt_file), ("shards", shards)) if value
        ]
        if len(given) != 1:
            raise ValueError(
                f"name exactly one of data.prompts, data.prompt_file and data.shards; given: {given or 'none'}"
            )
        for name, number in (("batch_size", batch_size), ("max_prompt_length", max_prompt_length)):
            if number is not None and number < 1:
                raise ValueError(f"data.{name} must be positive, not {number}")
        self.schedule = schedule
        self.level = level
        self.aspect_ratio = aspect_ratio
        self.max_prompt_length = max_prompt_length
        self.task: Task = task
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.kind = kind
        self.prompts = prompts
        self.prompt_file = prompt_file
        self.shards = dict(shards or {})
        self.splits = list(self.shards) if splits is None else splits
        self.per_split = per_split
        self.train_split = train_split
        self._consumed = 0
        self.text_tokenizer = load_text_tokenizer(text_tokenizer)
        self._check(level, aspect_ratio or 1.0, "data")
        for index, item in enumerate(prompts or ()):
            if isinstance(item, PromptItem):
                self._check(item.level or level, item.aspect_ratio or aspect_ratio or 1.0, f"data.prompts[{index}]")

    def train_dataloader(self) -> DataLoader:
        """The endless stream, from where it stopped. `batch_size` prompts for each process."""
        sources = self._sources([self.train_split], None)
        return DataLoader(_TrainingPrompts(sources, self), batch_size=None, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """Every prompt once over all ranks, in order of its index."""
        rank, num_ranks = self.rank
        sources = self._sources(self.splits, self.per_split)
        data = _Prompts(sources[rank::num_ranks], self)
        return DataLoader(data, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """The same prompts."""
        return self.predict_dataloader()

    def test_dataloader(self) -> DataLoader:
        """The same prompts."""
        return self.predict_dataloader()

    @property
    def rank(self) -> tuple[int, int]:
        """This process' number, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def make(self, source: PromptSource) -> Prompt:
        """Reads the images, if there are any, and encodes the texts."""
        item = source.item
        level = item.level or self.level
        segments: list[TextSegment | RawImage] = []
        if item.image is not None:
            segments.append(self._image(Path(item.image).read_bytes(), level, source, item.image))
        for part in source.parts:
            if "image" in part:
                segments.append(self._image(source.read_image(part["image"]), level, source, part["image"]))
            elif ids := self.text_tokenizer.encode(part["text"]):
                segments.append(TextSegment(ids=ids))
        ids = [] if source.parts else self.text_tokenizer.encode(item.prompt)
        if ids:
            segments.append(TextSegment(ids=ids))
        images = [segment for segment in segments if isinstance(segment, RawImage)]
        if self.task == "text" and not images:
            raise ValueError(
                f"{source.where}: task text needs an image; give `image`, or document shards in data.shards"
            )
        answer = tuple(
            part["text"]
            if "text" in part
            else self._image(source.read_image(part["image"]), level, source, part["image"])
            for part in source.answer
        )
        ratio = item.aspect_ratio or self.aspect_ratio
        if ratio is None or self.task == "text":
            known = [*(part for part in answer if isinstance(part, RawImage)), *images]
            ratio = known[0].aspect_ratio if known else 1.0
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
            kind=self.kind,
            metadata=source.metadata,
            answer=answer,
        )

    def _image(self, data: bytes, level: int, source: PromptSource, name: str) -> RawImage:
        try:
            image = decode_image(data)
            height, width = self.schedule.base_grid(image.height / image.width)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{source.where}: {name} cannot be used: {error}") from error
        ratio = height / width
        return RawImage(
            pixels_CHW=fit_image(image, self.schedule.pixels(level, ratio)),
            grids=self.schedule.grids(level, ratio),
            aspect_ratio=ratio,
        )

    # Exact resume

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes where the stream stands behind this batch, and takes the note off."""
        if not isinstance(batch, PromptBatch) or batch.position is None:
            return batch
        self._consumed = batch.position
        return replace(batch, position=None)

    def state_dict(self) -> dict[str, Any]:
        """Batches consumed, equal on all ranks, and what decides which prompts they were of."""
        return {"consumed": self._consumed, **self._decides()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a checkpoint stood.

        Raises:
            ValueError: another number of processes, batch size or seed.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        for name, now in self._decides().items():
            if state_dict[name] != now:
                raise ValueError(
                    f"the checkpoint was made with {name} = {state_dict[name]}, this run has {now}: the prompts cannot be "
                    "taken up at the same place. Use the same value, or start from the weights alone."
                )
        # Lightning looks for a resumable loader; here the DataModule itself goes on at the same prompt.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        self._consumed = state_dict["consumed"]

    def _decides(self) -> dict[str, int]:
        return {
            "trainer.devices x trainer.num_nodes": self.rank[1],
            "data.batch_size": self.batch_size,
            "data.seed": self.seed,
        }

    # Where prompts come from

    def _sources(self, splits: list[str], per_split: int | None) -> list[PromptSource]:
        sources = self._sources_of_shards(splits, per_split) if self.shards else self._sources_of_lines()
        if self.max_prompt_length is None:
            return sources
        return not_too_long(sources, self.text_tokenizer.encode, self.max_prompt_length)

    def _sources_of_lines(self) -> list[PromptSource]:
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
            PromptSource(
                index=index,
                item=PromptItem(prompt=item) if isinstance(item, str) else item,
                where=f"data.prompts[{index}]" if self.prompt_file is None else f"{self.prompt_file}, prompt {index}",
            )
            for index, item in enumerate(items)
        ]

    def _sources_of_shards(self, splits: list[str], per_split: int | None) -> list[PromptSource]:
        sources: list[PromptSource] = []
        for split in splits:
            if split not in self.shards:
                raise ValueError(
                    f"data.splits or data.train_split names {split!r}, but data.shards has {sorted(self.shards)}"
                )
            pattern = self.shards[split].replace("{level}", str(self.level))
            how = MAKE_CODES if "{level}" in self.shards[split] else MAKE_DOCUMENTS
            shards = [open_shard(path) for path in find_shards(pattern, f"data.shards.{split}", how)]
            samples = [(shard, key) for shard in shards for key in shard.keys]
            # Shards are sorted by key: the first few would all be flags.
            random.Random(f"{self.seed}/{split}").shuffle(samples)
            for shard, key in samples[:per_split]:
                source = source_of_sample(len(sources), shard, key, split, self.task)
                if shard.header.kind != "documents" and any("image" in part for part in source.parts):
                    raise ValueError(
                        f"data.shards.{split}: {shard.path} holds codes; prompts with images need document shards"
                    )
                sources.append(source)
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


class _TrainingPrompts(IterableDataset):
    """Batch n of rank r holds samples (n * ranks + r) * batch_size and on of an endless stream of shuffled passes."""

    def __init__(self, sources: list[PromptSource], owner: PromptDataModule):
        self.sources, self.make, self.seed = sources, owner.make, owner.seed
        self.batch_size, self.start = owner.batch_size, owner._consumed
        self.rank, self.num_ranks = owner.rank

    def __iter__(self) -> Iterator[PromptBatch]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        order = lru_cache(maxsize=2)(self._order)
        for number in count(self.start + worker, num_workers):
            first = (number * self.num_ranks + self.rank) * self.batch_size
            prompts = []
            for index in range(first, first + self.batch_size):
                number_of_pass, place = divmod(index, len(self.sources))
                source = self.sources[order(number_of_pass)[place]]
                prompts.append(self.make(replace(source, index=index, item=replace(source.item, seed=None))))
            yield PromptBatch(prompts=tuple(prompts), position=number + 1)

    def _order(self, number_of_pass: int) -> list[int]:
        order = list(range(len(self.sources)))
        random.Random(f"{self.seed}/{number_of_pass}").shuffle(order)
        return order


class _Prompts(IterableDataset):
    def __init__(self, sources: list[PromptSource], owner: PromptDataModule):
        self.batches = [sources[start : start + owner.batch_size] for start in range(0, len(sources), owner.batch_size)]
        self.make = owner.make

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        for batch in self.batches[worker::num_workers]:
            yield PromptBatch(prompts=tuple(self.make(source) for source in batch))
