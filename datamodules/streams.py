"""Streams of samples from shards that can be stopped and taken up again at the same sample. (`mixing.py` mixes several.)

A stream never ends. Pass p visits the shards in an order drawn from (seed, p), a window of shards at a time; within a window
all samples are in an order drawn from (seed, p, window). A place in it is three numbers, (pass, window, offset), so the
state of a stream is small, and a sample that was read but is in no batch yet is saved as its place and read again.

Several streams (one per rank and loader worker) share the data: with many shards each takes its own, with few they deal the
samples of each window.
"""

import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL.Image import DecompressionBombError

from nextflow.sequence.shards import Shard, open_shard

log = logging.getLogger(__name__)

BROKEN = (ValueError, KeyError, OSError, SyntaxError, DecompressionBombError)
"""What reading a broken sample raises (PIL reports a broken PNG as a SyntaxError, and one of absurd size as a bomb)."""
# A fraction means little over fewer samples than this.
MIN_SAMPLES_OF_FRACTION = 100

Item = TypeVar("Item")
Batch = TypeVar("Batch")
ItemIn = TypeVar("ItemIn", contravariant=True)


class Place(NamedTuple):
    """Where a sample stands in a stream."""

    number: int
    """Pass over the data."""
    window: int
    offset: int
    source: str = ""
    """Which of the streams of a mixture it belongs to."""


class Sample(NamedTuple):
    """A sample that has not been read."""

    shard: Shard
    key: str
    number: int
    """Pass over the data: with the seed and the key it decides everything random about the sample."""
    source: str = ""
    """Name of its source in a mixture."""
    part: int | None = None
    """Which image of its document, where images are evaluated one by one."""

    def random(self, seed: int) -> random.Random:
        """A generator that depends on (seed, pass, key) alone, not on worker, batch or what came before."""
        return random.Random(f"{seed}/{self.number}/{self.key}")


class Assembler(Protocol[ItemIn, Batch]):
    """Collects items until a batch is complete."""

    def add(self, item: ItemIn) -> Batch | None:
        """Takes an item; returns a batch if that completes one."""

    def pending(self) -> list[Any]:
        """The items that are in no batch yet, in an order in which adding them again restores this state."""

    def flush(self) -> list[Batch]:
        """What is left as batches."""


def find_shards(pattern: str, key: str, how: str) -> list[Path]:
    """Paths that match a glob pattern, sorted.

    Args:
        pattern: such as data/train/*.tar.
        key: the config key, for the message.
        how: the command that makes the data, for the message.

    Raises:
        FileNotFoundError: nothing matches.
    """
    paths = sorted(Path(path) for path in glob(pattern, recursive=True))
    if not paths:
        raise FileNotFoundError(f"{key}: no file matches {pattern!r}. Make the data first: {how}")
    return paths


class ShardFolder:
    """Opens shards and keeps the latest open."""

    def __init__(self, max_open: int = 64, opener: Callable[[Path], Shard] = open_shard):
        """
        Args:
            max_open: how many stay open.
            opener: opens one.
        """
        self.max_open = max_open
        self.opener = opener
        self.check: Callable[..., None] | None = None
        """Called with the header of each shard that is opened, and its path as `where`; raises where it does not fit."""
        self._shards: OrderedDict[Path, Shard] = OrderedDict()

    def __call__(self, path: Path) -> Shard:
        shard = self._shards.get(path)
        if shard is None:
            shard = self.opener(path)
            if self.check is not None:
                self.check(shard.header, where=str(path))
            self._shards[path] = shard
            while len(self._shards) > self.max_open:
                self._shards.popitem(last=False)
        self._shards.move_to_end(path)
        return shard


class SampleStream(Protocol):
    """An endless stream of samples."""

    def advance(self) -> tuple[Place, Sample]:
        """The next sample and its place."""

    def at(self, place: Place) -> Sample | None:
        """The sample at a place; None if the stream does not read there now."""

    def position(self) -> Any:
        """Where it stands, in plain JSON types."""

    def go_to(self, position: Any) -> None:
        """Goes on from where `position` was taken."""


class ShuffledStream:
    """An endless stream over its part of the samples of some shards."""

    def __init__(
        self,
        paths: Sequence[Path],
        folder: ShardFolder,
        *,
        seed: int,
        slot: int = 0,
        num_slots: int = 1,
        window_shards: int = 16,
        start: Place = Place(0, 0, 0),  # noqa: B008 (immutable)
    ):
        """
        Args:
            paths: all shards, the same list for all slots.
            folder: opens them.
            seed: of the order.
            slot: this stream's number among `num_slots` that share the data.
            num_slots: how many share it.
            window_shards: shards that are shuffled together.
            start: the place to begin at.
        """
        self.paths = list(paths)
        self.folder = folder
        self.seed = seed
        self.slot = slot
        self.num_slots = num_slots
        self.window_shards = window_shards
        self.next_place = start
        self._order: tuple[tuple[int, int], list[tuple[Path, str]]] | None = None

    def advance(self) -> tuple[Place, Sample]:
        """The next sample and its place."""
        number, window, offset, _ = self.next_place
        empty = 0
        while offset >= len(order := self._samples(number, window)):
            empty += not order
            if empty > self._num_windows + 1:
                raise ValueError(f"the {len(self.paths)} shards beside {self.paths[0]} hold too few samples")
            window, offset = window + 1, 0
            if window >= self._num_windows:
                number, window = number + 1, 0
        place = Place(number, window, offset)
        self.next_place = Place(number, window, offset + 1)
        path, key = order[offset]
        return place, Sample(self.folder(path), key, number)

    def at(self, place: Place) -> Sample:
        """The sample at a place."""
        path, key = self._samples(place.number, place.window)[place.offset]
        return Sample(self.folder(path), key, place.number)

    def position(self) -> list[int]:
        """The three numbers of the next place."""
        return list(self.next_place[:3])

    def go_to(self, position: Sequence[int]) -> None:
        """Makes `position` the next place."""
        number, window, offset = position
        self.next_place = Place(number, window, offset)

    @property
    def _deals_shards(self) -> bool:
        return len(self.paths) >= self.num_slots * self.window_shards

    @property
    def _num_windows(self) -> int:
        count = len(self.paths[self.slot :: self.num_slots]) if self._deals_shards else len(self.paths)
        return -(-count // self.window_shards)

    def _samples(self, number: int, window: int) -> list[tuple[Path, str]]:
        if self._order is not None and self._order[0] == (number, window):
            return self._order[1]
        shuffled = [
            self.paths[index] for index in np.random.default_rng([self.seed, number]).permutation(len(self.paths))
        ]
        if self._deals_shards:
            shuffled = shuffled[self.slot :: self.num_slots]
        paths = shuffled[window * self.window_shards : (window + 1) * self.window_shards]
        samples = [(path, key) for path in paths for key in self.folder(path).keys]
        order = np.random.default_rng([self.seed, number, window + 1]).permutation(len(samples))
        mine = order if self._deals_shards else order[self.slot :: self.num_slots]
        result = [samples[index] for index in mine]
        self._order = ((number, window), result)
        return result


class Health:
    """Counts samples that cannot be read, of each source by itself, and stops the run when they are too many."""

    def __init__(self, max_bad_fraction: float):
        self.max_bad_fraction = max_bad_fraction
        self.num_read: Counter[str] = Counter()
        self.num_bad: Counter[str] = Counter()

    def read(self, reader: Callable[[Sample], Item], sample: Sample) -> Item | None:
        """What `reader` makes of the sample, or None (logged and counted) if it cannot be read.

        Raises:
            ValueError: more than `max_bad_fraction` cannot be read.
        """
        source = sample.source
        self.num_read[source] += 1
        try:
            return reader(sample)
        except BROKEN as error:
            self.num_bad[source] += 1
            log.warning("skipped %s, key %s: %s", sample.shard.path, sample.key, error)
            self.check(source, max(self.num_read[source], MIN_SAMPLES_OF_FRACTION), error)
            return None

    def check(self, source: str, num_read: int | None = None, error: Exception | None = None) -> None:
        """Raises if too many of `num_read` samples (default: of all that were read) of a source were bad."""
        num_read = self.num_read[source] if num_read is None else num_read
        if self.num_bad[source] > self.max_bad_fraction * num_read:
            raise ValueError(
                f"{self.num_bad[source]} of {num_read} samples{f' of {source}' if source else ''} cannot be read, more than "
                f"`data.max_bad_fraction` = {self.max_bad_fraction}; the warnings above name shard and key of each. "
                "Mend them, or raise the key."
            ) from error


class Read(NamedTuple, Generic[Item]):
    """An item and where it came from."""

    place: Place
    item: Item


def train_batches(
    stream: SampleStream,
    reader: Callable[[Sample], Item],
    assembler: Assembler[Read[Item], Batch],
    health: Health,
    position: dict[str, Any] | None = None,
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Endless batches, each with the position that follows it.

    Args:
        stream: where samples come from; a position moves it.
        reader: reads a sample.
        assembler: an empty one.
        health: counts what cannot be read.
        position: of the batch after which to go on; None for the beginning.
    """
    absent: list[Place] = []

    def after(remaining: Sequence[Place]) -> dict[str, Any]:
        places = [*(read.place for read in assembler.pending()), *remaining, *absent]
        return {"next": stream.position(), "pending": [list(place) for place in places]}

    if position is not None:
        stream.go_to(position["next"])
        places = [Place(*numbers) for numbers in position["pending"]]
        samples = [(place, stream.at(place)) for place in places]
        # What belongs to a source that this stage of a curriculum does not read waits for a stage that does.
        absent = [place for place, sample in samples if sample is None]
        pending = [(place, sample) for place, sample in samples if sample is not None]
        for index, (place, sample) in enumerate(pending):
            item = health.read(reader, sample)
            batch = None if item is None else assembler.add(Read(place, item))
            if batch is not None:  # a later stage of a curriculum may have smaller batches
                yield batch, after([place for place, _ in pending[index + 1 :]])
    passes: dict[str, int] = {}
    num_good: Counter[str] = Counter()
    whole: set[str] = set()  # sources whose pass was seen from its beginning: enough to judge a small data set by
    while True:
        place, sample = stream.advance()
        source = place.source
        if passes.get(source) != place.number:
            if source in passes:
                health.check(sample.source)
            if source in whole and not num_good[source]:
                raise ValueError(
                    f"none of the samples beside {sample.shard.path} can be used; the warnings above say why"
                )
            if source in passes or (place.window, place.offset) == (0, 0):
                whole.add(source)
            passes[source] = place.number
        item = health.read(reader, sample)
        if item is None:
            continue
        num_good[source] += 1
        batch = assembler.add(Read(place, item))
        if batch is not None:
            yield batch, after([])


def evaluation_batches(
    samples: Sequence[Sample],
    reader: Callable[[Sample], Item],
    assembler: Assembler[Read[Item], Batch],
    health: Health,
    *,
    chunk: int,
    pieces: Callable[[Sample], Sequence[Sample]],
    worker: int = 0,
    num_workers: int = 1,
) -> Iterator[Batch]:
    """Each piece of each sample once. A worker takes every `num_workers`-th chunk of samples, and no batch crosses chunks, so
    that the batches do not depend on the number of workers."""
    for start in range(worker * chunk, len(samples), num_workers * chunk):
        for offset, sample in enumerate(samples[start : start + chunk], start):
            for piece in pieces(sample):
                item = health.read(reader, piece)
                batch = None if item is None else assembler.add(Read(Place(0, 0, offset), item))
                if batch is not None:
                    yield batch
        yield from assembler.flush()
