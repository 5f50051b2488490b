"""The OpenMoji sources by name, and writing them as document shards: `output/KIND/SPLIT/000000.tar`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.edits import edits
from nextflow.datamodules.openmoji.examples import examples
from nextflow.datamodules.openmoji.facts import facts
from nextflow.datamodules.openmoji.questions import questions
from nextflow.datamodules.openmoji.reasoning import reasoning
from nextflow.datamodules.openmoji.scenes import scenes
from nextflow.datamodules.openmoji.stories import stories
from nextflow.datamodules.openmoji.world import MojiDocument, World, kept
from nextflow.sequence.shards import ShardHeader, ShardWriter

Kind = Literal["edits", "stories", "scenes", "examples", "reasoning", "questions", "text"]

KINDS: dict[Kind, Callable[[World, str], Iterator[MojiDocument | None]]] = {
    "edits": edits,
    "stories": stories,
    "scenes": scenes,
    "examples": examples,
    "reasoning": reasoning,
    "questions": questions,
    "text": facts,
}
# Documents of a held-out split for each document of training.
HELD_OUT_SHARE = 0.05


class KindReport(NamedTuple):
    """What was written of one kind and split."""

    kind: str
    split: str
    num_documents: int
    texts: list[str]
    """Of the training split, for the text tokenizer."""


class _Job(NamedTuple):
    kind: Kind
    split: str
    num_documents: int
    folder: Path
    header: ShardHeader
    samples_per_shard: int
    prompt_loss: bool


def write_kinds(
    world: World,
    kinds: Mapping[Kind, int],
    output: Path,
    *,
    header: ShardHeader,
    samples_per_shard: int,
    prompt_loss: bool,
    num_workers: int,
) -> Iterator[KindReport]:
    """Writes each kind and split, one after another or several at once; yields a report of each.

    Args:
        world: what the documents are made of.
        kinds: training documents of each kind.
        output: folder that gets one folder per kind.
        header: of every shard.
        samples_per_shard: documents per tar file.
        prompt_loss: whether questions, requests and examples are trained on.
        num_workers: processes.
    """
    jobs = [
        _Job(kind, split, _count(split, count), output / kind / split, header, samples_per_shard, prompt_loss)
        for kind, count in kinds.items()
        for split in SPLITS
    ]
    if num_workers < 2:
        for job in jobs:
            yield _write(world, job)
        return
    with ProcessPoolExecutor(num_workers, initializer=_start, initargs=(world,)) as pool:
        yield from pool.map(_write_in_process, jobs)


def record_of(document: MojiDocument, kind: str, prompt_loss: bool) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A document as KEY.json and files."""
    segments: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for place, segment in enumerate(document.segments):
        loss: dict[str, Any] = {} if prompt_loss or place >= document.prompt else {"loss": False}
        if isinstance(segment, str):
            segments.append({"text": segment, **loss})
        else:
            name = f"{len(files)}.png"
            files[name] = segment
            segments.append({"image": name, **loss})
    return {"segments": segments, "source": f"openmoji/{kind}", "metadata": document.metadata}, files


def texts_of(documents: Iterable[MojiDocument]) -> list[str]:
    """All texts of some documents."""
    return [segment for document in documents for segment in document.segments if isinstance(segment, str)]


def _count(split: str, count: int) -> int:
    return count if split == "train" else max(1, round(HELD_OUT_SHARE * count))


def _write(world: World, job: _Job) -> KindReport:
    texts: list[str] = []
    with ShardWriter(job.folder, header=job.header, samples_per_shard=job.samples_per_shard) as writer:
        for index, document in enumerate(islice(kept(KINDS[job.kind](world, job.split)), job.num_documents)):
            record, files = record_of(document, job.kind, job.prompt_loss)
            writer.write(f"{index:06d}", record, files)
            if job.split == "train":
                texts += texts_of([document])
    return KindReport(job.kind, job.split, writer.num_samples, texts)


_world: World | None = None


def _start(world: World) -> None:
    global _world  # the one thing that a pool's workers can be given once
    _world = world


def _write_in_process(job: _Job) -> KindReport:
    assert _world is not None
    return _write(_world, job)
