"""Streams of samples from shards that can be stopped and taken up again at the same sample.

A stream never ends. Pass p visits the shards in an order drawn from (seed, p), a window of shards at a time; within a window
all samples are in an order drawn from (seed, p, window). A place in it is three numbers, (pass, window, offset), so the
state of a stream is small, and a sample that was read but is in no batch yet is saved as its place and read again.

Several streams (one per rank and loader worker) share the data: with many shards each takes its own, with few they deal the
samples of each window.
"""

import logging
import random
from collections import OrderedDict
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


class Sample(NamedTuple):
    """A sample that has not been read."""

    shard: Shard
    key: str
    number: int
    """Pass over the data: with the seed and the key it decides everything random about the sample."""

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
        number, window, offset = self.next_place
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
    """Counts samples that cannot be read and stops the run when they are too many."""

    def __init__(self, max_bad_fraction: float):
        self.max_bad_fraction = max_bad_fraction
        self.num_read = 0
        self.num_bad = 0

    def read(self, reader: Callable[[Sample], Item], sample: Sample) -> Item | None:
        """What `reader` makes of the sample, or None (logged and counted) if it cannot be read.

        Raises:
            ValueError: more than `max_bad_fraction` cannot be read.
        """
        self.num_read += 1
        try:
            return reader(sample)
        except BROKEN as error:
            self.num_bad += 1
            log.warning("skipped %s, key %s: %s", sample.shard.path, sample.key, error)
            self.check(max(self.num_read, MIN_SAMPLES_OF_FRACTION), error)
            return None

    def check(self, num_read: int, error: Exception | None = None) -> None:
        """Raises if too many of `num_read` samples were bad."""
        if self.num_bad > self.max_bad_fraction * num_read:
            raise ValueError(
                f"{self.num_bad} of {self.num_read} samples cannot be read, more than `data.max_bad_fraction` = "
                f"{self.max_bad_fraction}; the warnings above name shard and key of each. Mend them, or raise the key."
            ) from error


class Read(NamedTuple, Generic[Item]):
    """An item and where it came from."""

    place: Place
    item: Item


def train_batches(
    stream: ShuffledStream,
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

    def after(remaining: list[list[int]]) -> dict[str, Any]:
        return {
            "next": list(stream.next_place),
            "pending": [list(read.place) for read in assembler.pending()] + remaining,
        }

    if position is not None:
        stream.next_place = Place(*position["next"])
        for index, numbers in enumerate(position["pending"]):
            batch = assembler.add(Read(Place(*numbers), reader(stream.at(Place(*numbers)))))
            if batch is not None:  # a later stage of a curriculum may have smaller batches
                yield batch, after(position["pending"][index + 1 :])
    number, num_good = stream.next_place.number, 0
    while True:
        place, sample = stream.advance()
        if place.number != number:
            # A whole pass is enough to judge a small data set by.
            health.check(health.num_read)
            if not num_good and position is None and number == 0:
                raise ValueError(
                    f"none of the samples beside {stream.paths[0]} can be used; the warnings above say why"
                )
            number = place.number
        item = health.read(reader, sample)
        if item is None:
            continue
        num_good += 1
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
    worker: int = 0,
    num_workers: int = 1,
) -> Iterator[Batch]:
    """Each sample once. A worker takes every `num_workers`-th chunk of samples, and no batch crosses chunks, so that the
    batches do not depend on the number of workers."""
    for start in range(worker * chunk, len(samples), num_workers * chunk):
        for offset, sample in enumerate(samples[start : start + chunk], start):
            item = health.read(reader, sample)
            batch = None if item is None else assembler.add(Read(Place(0, 0, offset), item))
            if batch is not None:
                yield batch
        yield from assembler.flush()
