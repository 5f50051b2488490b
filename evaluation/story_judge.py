"""Judge of stories in pictures: do they begin with what their first sentence says, and does the subject stay?"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nextflow.evaluation.gallery import Gallery
from nextflow.evaluation.suite import Answered, Verdict, image_of


class StoryJudge:
    """Stories told from their first sentence: do they begin with what it says, and does the subject stay?

    Each further picture shows another drawing of the same subject: one that some story tells together with it (the faces of the
    clock, the flags of one letter), or the same in another skin tone. Where things are counted, each picture shows the same
    thing, always once more or always once less.
    """

    def __init__(self, gallery: Gallery, stories: Path, reader: Any) -> None:
        self.gallery, self.reader = gallery, reader
        self.subject = _subjects(gallery, stories)

    def __call__(self, answers: Sequence[Answered]) -> list[list[Verdict]]:
        """story, first picture; story consistency."""
        series = [isinstance(answer.metadata["pictures"][0], str) for answer in answers]
        named = iter(self.gallery.nearest(_all_pictures(answers, series)))
        read = iter(self.reader.read([image_of(one) for one in _all_pictures(answers, [not one for one in series])]))
        verdicts = []
        for answer, is_series in zip(answers, series):
            asked, topic = answer.metadata["pictures"][0], answer.metadata["series"]
            if is_series:
                begins, stays = self._of_series(self.gallery.place[asked], list(islice(named, len(answer.pictures))))
            else:
                begins, stays = _of_counting(asked, list(islice(read, len(answer.pictures))))
            whole = begins and stays and len(answer.pictures) > 1
            verdicts.append(
                [Verdict("story, first picture", begins, topic), Verdict("story consistency", whole, topic)]
            )
        return verdicts

    def _of_series(self, first: int, shown: list[int]) -> tuple[bool, bool]:
        """Whether it begins with the right drawing, and whether each further one is another of its subject."""
        moves = all(before != after for before, after in pairwise(shown))
        return shown[:1] == [first], moves and all(self.subject[place] == self.subject[first] for place in shown)


def _of_counting(asked: Mapping[str, Any], readings: Sequence[Any]) -> tuple[bool, bool]:
    """Whether it begins with the right number of the right thing, and whether it goes on counting that thing."""
    hexcode, counts = asked["groups"][0]["hexcode"], [len(reading.found) for reading in readings]
    same = [all(found.hexcode == hexcode for found in reading.found) for reading in readings]
    steps = {after - before for before, after in pairwise(counts)}
    return same[:1] == [True] and counts[0] == len(asked["objects"]), all(same) and steps in ({1}, {-1})


def _subjects(gallery: Gallery, stories: Path) -> list[int]:
    """For each drawing a number that it shares with those of its subject."""
    subject = list(range(len(gallery.captions)))

    def find(place: int) -> int:
        while subject[place] != place:
            place = subject[place]
        return place

    def join(places: Sequence[int]) -> None:
        for place in places:
            subject[find(place)] = find(places[0])

    plain: dict[str, list[int]] = {}
    for place in gallery.place.values():
        plain.setdefault(re.sub(r", [^,]*skin tone$", "", gallery.captions[place]), []).append(place)
    for places in plain.values():
        join(places)
    for path in sorted(stories.glob("*/*.tar")):
        for pictures in _told(path):
            join([gallery.place[key] for key in pictures])
    return [find(place) for place in range(len(subject))]


def _told(path: Path) -> list[list[str]]:
    """Keys of the drawings of each story of a shard; none for counted things."""
    told = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".json") and not member.name.startswith("_"):
                record = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]  # a file
                told.append([key for key in record["metadata"]["pictures"] if isinstance(key, str)])
    return [keys for keys in told if keys]


def _all_pictures(answers: Sequence[Answered], chosen: Sequence[bool]) -> list[np.ndarray]:
    return [picture for answer, is_chosen in zip(answers, chosen) if is_chosen for picture in answer.pictures]
