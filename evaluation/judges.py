"""Judges of the OpenMoji suite: each looks at one kind of prompt, made of OpenMoji's documents, whose metadata know the truth.

Composed scenes are read back with the very drawings and compared with what was asked for, in the manner of GenEval
(arXiv 2310.11513). A picture of one drawing shows that drawing of all which is nearest (`gallery.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextflow.evaluation.captions import token_f1, words_of
from nextflow.evaluation.gallery import Gallery
from nextflow.evaluation.story_judge import StoryJudge
from nextflow.evaluation.suite import Answered, Judge, Measure, Verdict, image_of, pictures_of, text_of

CATEGORIES = (
    "single object", "two objects", "counting", "colours", "position", "attribute binding", "background",
    "retrieval at rank 1", "retrieval at rank 5", "skin tone within one", "editing", "editing, changed", "editing, rest kept",
    "story, first picture", "story consistency", "captioning", "questions", "reconstruction",
)  # fmt: skip
"""In the order of the table."""
BACKGROUND_TOLERANCE = 12.0
"""Mean difference of a channel, 0 to 255, up to which the nearest background counts as that one."""
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
"""Skin tones in the order in which they are neighbours."""
EDITED_ABOVE = 0.1
"""Largest difference of a channel, 0 to 1, between source and known result above which a pixel belongs to the edit."""
MOST_MOVED = 0.05
"""Mean difference of a channel, 0 to 1, up to which the pixels beside the edit count as kept."""


def openmoji_judges(documents: str | Path, reader: Any) -> dict[str, Judge]:
    """The judges by the kind of prompt they look at.

    Args:
        documents: folder that `python -m nextflow.datamodules.openmoji` wrote, with stories.
        reader: finds drawings in pictures: `read(images)` and `facts`, as `nextflow.rewards.scene_reader.SceneReader`.
    """
    gallery = Gallery(documents)
    return {
        "scenes": SceneJudge(reader),
        "drawings": DrawingJudge(gallery),
        "edits": EditJudge(gallery),
        "stories": StoryJudge(gallery, Path(documents) / "stories", reader),
        "captions": CaptionJudge(gallery),
        "questions": judge_questions,
        "reconstruction": ReconstructionJudge(gallery),
    }


class SceneJudge:
    """Composed scenes. One picture counts in every category that its scene asks something of.

    A scene that was cut to the ratio of its grids shows its drawings no more as they were put there, and counts nowhere.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __call__(self, answers: Sequence[Answered]) -> list[list[Verdict]]:
        """single object, two objects, counting, colours, position, attribute binding, background."""
        whole = [_has_ratio(pictures_of(answer.known)[-1], *answer.metadata["size"]) for answer in answers]
        pictures = [image_of(answer.pictures[-1]) for answer, is_whole in zip(answers, whole) if is_whole]
        readings = iter(self.reader.read(pictures))
        colours = {answer.metadata["background"]: answer.metadata["background_rgb"] for answer in answers}
        return [
            [
                Verdict(category, right, answer.metadata["layout"])
                for category, right in self._judge(answer.metadata, next(readings), colours)
            ]
            if is_whole
            else []
            for answer, is_whole in zip(answers, whole)
        ]

    def _judge(self, known: Mapping[str, Any], reading: Any, backgrounds: Mapping[str, Any]) -> list[tuple[str, bool]]:
        groups, asked = known["groups"], Counter(thing["hexcode"] for thing in known["objects"])
        number = len(known["objects"])
        exact = Counter(found.hexcode for found in reading.found) == asked
        verdicts = []
        if number == 1:
            verdicts.append(("single object", exact))
        if number == len(groups) == 2:
            verdicts.append(("two objects", exact))
        if len(groups) == 1 and number > 1:
            verdicts.append(("counting", exact))
        if len(groups) == 1 and groups[0]["colour"]:
            colours = {self.reader.facts[found.hexcode]["colour"] for found in reading.found}
            verdicts.append(("colours", colours == {groups[0]["colour"]}))
        if number == len(groups) and all(group["place"] for group in groups):
            placed = [
                any(
                    found.hexcode == group["hexcode"] and is_in(group["place"], *found.centre)
                    for found in reading.found
                )
                for group in groups
            ]
            verdicts.append(("position", all(placed)))
        if len(groups) > 1 and (number > len(groups) or sum(bool(group["colour"]) for group in groups) > 1):
            verdicts.append(("attribute binding", exact))
        if known["background"] != "white":
            error = {name: np.abs(np.subtract(reading.background, rgb)).mean() for name, rgb in backgrounds.items()}
            nearest = min(error, key=error.__getitem__)
            verdicts.append(
                ("background", nearest == known["background"] and bool(error[nearest] <= BACKGROUND_TOLERANCE))
            )
        return verdicts


def is_in(place: str, x: float, y: float) -> bool:
    """Whether a point (fractions of width and height) is where a place's name says: left, top right corner, 2 of 3 down."""
    words = place.split()
    if "of" in words:
        index, number = int(words[0]) - 1, int(words[2])
        return int((x if words[3] == "across" else y) * number) == index
    sides = {"left": x < 0.5, "right": x > 0.5, "top": y < 0.5, "bottom": y > 0.5}
    return all(sides[word] for word in words if word in sides)


class DrawingJudge:
    """Pictures of captions: is the picture nearest to the drawing of its caption, among all drawings?"""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery

    def __call__(self, answers: Sequence[Answered]) -> list[list[Verdict]]:
        """retrieval at rank 1, retrieval at rank 5; where a skin tone is asked for, skin tone within one."""
        pictures = [answer.pictures[-1] for answer in answers]
        ranks = self.gallery.ranks(pictures, [answer.key for answer in answers])
        verdicts = []
        for answer, rank, nearest in zip(answers, ranks, self.gallery.nearest(pictures)):
            of_ranks = [
                Verdict(f"retrieval at rank {limit}", rank <= limit, answer.metadata["group"]) for limit in (1, 5)
            ]
            verdicts.append([*of_ranks, *self._tone(answer.metadata, nearest)])
        return verdicts

    def _tone(self, known: Mapping[str, Any], nearest: int) -> list[Verdict]:
        """Whether the picture shows the subject asked for, in its skin tone or one next to it; the detail is the tone."""
        tone = known.get("skin_tone")
        if tone not in TONES:
            return []
        place = TONES.index(tone)
        captions = [f"{known['subject']}, {near} skin tone" for near in TONES[max(0, place - 1) : place + 2]]
        return [Verdict("skin tone within one", any(nearest in self.gallery.called(one) for one in captions), tone)]


class ReconstructionJudge:
    """Drawings as the image tokenizer gives them back: are they still nearest to themselves?"""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery

    def __call__(self, answers: Sequence[Answered]) -> list[list[Verdict]]:
        """reconstruction, with PSNR."""
        ranks = self.gallery.ranks([answer.pictures[-1] for answer in answers], [answer.key for answer in answers])
        verdicts = []
        for answer, rank in zip(answers, ranks):
            error = _difference(answer.pictures[-1], pictures_of(answer.known)[-1])
            psnr = -10 * np.log10(max(float((error**2).mean()), 1e-10))
            verdicts.append([Verdict("reconstruction", rank == 1, answer.metadata["group"], Measure(psnr, "dB"))])
        return verdicts


class EditJudge:
    """Edits: the nearest of all drawings is the known result, and what is not of the edit is as it was.

    The pixels of the edit are those in which source and known result differ (as for `nextflow.rewards.edit`).
    """

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery

    def __call__(self, answers: Sequence[Answered]) -> list[list[Verdict]]:
        """editing: both; editing, changed; editing, rest kept."""
        targets = [answer.metadata["target"] for answer in answers]
        ranks = self.gallery.ranks([answer.pictures[-1] for answer in answers], targets)
        verdicts = []
        for answer, rank in zip(answers, ranks):
            source, result = pictures_of(answer.given)[0], pictures_of(answer.known)[-1]
            rest_HW = _difference(source, result).max(axis=-1) <= EDITED_ABOVE
            kept = bool(_difference(answer.pictures[-1], source)[rest_HW].mean() <= MOST_MOVED)
            of_both = {"editing": rank == 1 and kept, "editing, changed": rank == 1, "editing, rest kept": kept}
            verdicts.append(
                [Verdict(category, right, answer.metadata["attribute"]) for category, right in of_both.items()]
            )
        return verdicts


class CaptionJudge:
    """Captions of drawings: right if they are the caption of this drawing, or of one that looks the same."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery

    def __call__(self, answers: Sequence[Answered]) -> list[list[Verdict]]:
        """captioning, with the F1 of its words."""
        verdicts = []
        for answer in answers:
            right = self.gallery.place[answer.key] in self.gallery.called(answer.text)
            f1 = token_f1(words_of(answer.text), words_of(text_of(answer.known)))
            verdicts.append([Verdict("captioning", right, answer.metadata["group"], Measure(f1, "F1"))])
        return verdicts


def judge_questions(answers: Sequence[Answered]) -> list[list[Verdict]]:
    """Question answering: the known answer, word for word. Scenes have many right captions, so these are left out."""
    return [
        []
        if answer.metadata["kind"] == "caption"
        else [Verdict("questions", words_of(answer.text) == words_of(text_of(answer.known)), answer.metadata["kind"])]
        for answer in answers
    ]


def _has_ratio(pixels_HWC: np.ndarray, height: int, width: int) -> bool:
    return pixels_HWC.shape[0] * width == pixels_HWC.shape[1] * height


def _difference(first_HWC: np.ndarray, second_HWC: np.ndarray) -> np.ndarray:
    """Absolute difference, 0 to 1."""
    return np.abs(first_HWC.astype(np.float32) - second_HWC.astype(np.float32)) / 255
