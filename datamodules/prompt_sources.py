"""Where prompts come from: items of the config, lines of a file, documents of shards. Nothing is read until it is needed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nextflow.datamodules.images import caption_of
from nextflow.sequence.shards import Shard

log = logging.getLogger(__name__)

Task = Literal["image", "text", "reasoning", "interleaved"]


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


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """A prompt before its image is read."""

    index: int
    item: PromptItem
    where: str
    key: str = ""
    split: str = "prompts"
    shard: Shard | None = None
    parts: tuple[dict[str, Any], ...] = ()
    """Segments of the sample's record that the model is shown; without them it is shown `item`."""
    answer: tuple[dict[str, Any], ...] = ()
    """Segments that the document answers with; without its pictures where the shard holds codes."""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """What is encoded as text ids."""
        return [part["text"] for part in self.parts if "text" in part] if self.parts else [self.item.prompt]

    def read_image(self, name: str) -> bytes:
        """The file of a picture of its document."""
        assert self.shard is not None
        return self.shard.read(self.key, name)


def not_too_long(sources: Sequence[PromptSource], encode: Callable[[str], list[int]], limit: int) -> list[PromptSource]:
    """The prompts of at most `limit` text ids. Documents of shards that are longer are left out, with a warning.

    Raises:
        ValueError: a prompt of the config or of a file is longer, or all documents are.
    """
    kept = []
    for source in sources:
        length = sum(len(encode(text)) for text in source.texts)
        if length <= limit:
            kept.append(source)
        elif source.shard is None:
            raise ValueError(
                f"{source.where} has {length} text ids, data.max_prompt_length is {limit}: shorten it or raise the limit"
            )
    if sources and not kept:
        raise ValueError(f"all {len(sources)} prompts have more text ids than data.max_prompt_length = {limit}")
    if len(kept) < len(sources):
        left_out = len(sources) - len(kept)
        log.warning(
            "data.max_prompt_length = %d: %d of %d prompts are longer and left out", limit, left_out, len(sources)
        )
    return kept


def source_of_sample(index: int, shard: Shard, key: str, split: str, task: Task) -> PromptSource:
    """The prompt that a sample makes for a task (`PromptDataModule` says which of its segments are shown), and its answer."""
    record = shard.record(key)
    segments: list[dict[str, Any]] = record["segments"]
    where = f"{shard.path}, key {key}"
    pictures = [place for place, segment in enumerate(segments) if "image" in segment]
    given = [place for place, segment in enumerate(segments) if not segment.get("loss", True)]
    if task == "text":
        shown = given if set(given) & set(pictures) else pictures[:1]
    elif task == "reasoning":
        shown = given
        if not shown:
            raise ValueError(f"{where}: task reasoning needs segments without loss in front; this document has none")
    elif task == "interleaved":
        shown = list(range(min(pictures, default=len(segments))))
    else:
        # A caption may stand behind its picture.
        shown = list(range(max(pictures, default=len(segments)))) or [
            place for place, segment in enumerate(segments) if "text" in segment
        ]
    # A text is answered without pictures, and those of codes cannot be shown.
    kinds = ("text",) if task == "text" or shard.header.kind != "documents" else ("text", "image")
    parts = [segments[place] for place in shown]
    answer = [
        segment
        for place, segment in enumerate(segments)
        if place not in shown and any(kind in segment for kind in kinds)
    ]
    return PromptSource(
        index=index,
        item=PromptItem(prompt=caption_of({"segments": answer if task == "text" else parts})),
        where=where,
        key=key,
        split=split,
        shard=shard,
        parts=tuple(parts),
        answer=tuple(answer),
        metadata=record.get("metadata", {}),
    )
