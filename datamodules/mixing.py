"""A stream that draws each next sample from one of several sources, by weight.

Which source sample n of a slot comes from is a function of (seed, slot, n) and the weights alone, so the state is n and the
places of the sources' own streams. A source keeps its place while a stage of a curriculum does not read it.
"""

import hashlib
import random
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from nextflow.datamodules.streams import Place, Sample, ShardFolder, ShuffledStream


class SourceShards(NamedTuple):
    """Where a source is read, and how often."""

    name: str
    place: str
    """Name of its stream in states: one source has a place of its own in the shards of every level."""
    paths: list[Path]
    weight: float


class MixedStream:
    """An endless stream over several sources. Weights need not sum to one; those of 0 are left out."""

    def __init__(
        self,
        sources: Sequence[SourceShards],
        folder: ShardFolder,
        *,
        seed: int,
        slot: int = 0,
        num_slots: int = 1,
        window_shards: int = 16,
    ):
        """
        Args:
            sources: what is mixed.
            folder: opens shards.
            seed: of the choice and of each source's order.
            slot: this stream's number among `num_slots` that share the data.
            num_slots: how many share it.
            window_shards: shards of a source that are shuffled together.
        """
        self.sources = [source for source in sources if source.weight > 0]
        self.seed = seed
        self.slot = slot
        self.num_drawn = 0
        self._limits = list(accumulate(source.weight for source in self.sources))
        self._streams = {
            source.place: ShuffledStream(
                source.paths,
                folder,
                seed=_seed_of(seed, source.name),
                slot=slot,
                num_slots=num_slots,
                window_shards=window_shards,
            )
            for source in self.sources
        }
        self._names = {source.place: source.name for source in self.sources}
        self._resting: dict[str, Any] = {}
        """Positions of streams that are not read now."""

    def advance(self) -> tuple[Place, Sample]:
        """The next sample and its place."""
        drawn = random.Random(f"{self.seed}/{self.slot}/{self.num_drawn}").random() * self._limits[-1]
        self.num_drawn += 1
        source = self.sources[min(bisect(self._limits, drawn), len(self.sources) - 1)]
        place, sample = self._streams[source.place].advance()
        return place._replace(source=source.place), sample._replace(source=source.name)

    def at(self, place: Place) -> Sample | None:
        """The sample at a place; None if its source is not read now."""
        if place.source not in self._streams:
            return None
        return self._streams[place.source].at(place)._replace(source=self._names[place.source])

    def position(self) -> dict[str, Any]:
        """Number of samples drawn, and the places of all sources."""
        places = {name: stream.position() for name, stream in self._streams.items()}
        return {"drawn": self.num_drawn, "streams": {**self._resting, **places}}

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on from there; a source that the position does not know starts at its beginning."""
        self.num_drawn = position["drawn"]
        for name, place in position["streams"].items():
            if name in self._streams:
                self._streams[name].go_to(place)
            else:
                self._resting[name] = place


def _seed_of(seed: int, name: str) -> int:
    """Sources over the same shards must not meet the same document at the same time."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
