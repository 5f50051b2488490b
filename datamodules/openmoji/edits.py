"""Editing pairs of OpenMoji: two drawings whose code points differ in exactly one attribute, and an instruction between them.

Attributes: skin tone, gender (woman or man), hair (red, curly, white, blond, bald), direction. A pair belongs to the split of
its result, and pairs of training hold drawings of training alone. Hair is drawn in a colour that goes with the skin
tone, so that pictures of another tone may differ in it too.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from nextflow.datamodules.openmoji.catalogue import SPLITS, Drawing
from nextflow.datamodules.openmoji.phrases import phrase, sentence
from nextflow.datamodules.openmoji.world import MojiDocument, World, cycled, tone_of

_MAN, _WOMAN, _PERSON, _BLOND_PERSON = 0x1F468, 0x1F469, 0x1F9D1, 0x1F471
_MALE, _FEMALE, _RIGHT, _JOINER = 0x2642, 0x2640, 0x27A1, 0x200D
_HAIR = {0x1F9B0: "red", 0x1F9B1: "curly", 0x1F9B2: "bald", 0x1F9B3: "white"}

# How many of ten documents change each attribute: skin tones alone make nine of ten pairs.
SHARES = {"skin tone": 4, "gender": 3, "hair": 2, "direction": 1}

_INSTRUCTIONS = {
    "skin tone": "[[Change|Turn|Set] the skin [tone|colour] to {to}|[Give {whom}|Draw {whom} with] {to} skin[ tone|]|"
    "Make {whose} skin {to}|Same picture, [but |]{to} skin[ tone|]|{to} skin tone, please|"
    "[Recolour|Repaint] the skin from {origin} to {to}]",
    "gender": "[[Turn|Change|Make] the {origin} into a {to}|Replace the {origin} with a {to}|Swap the {origin} for a {to}|"
    "Now as a {to}|The same, but as a {to}|Draw a {to} instead[ of the {origin}|]|[Let it be|Make it] a {to}]",
    "hair": "[[Make|Turn] {whose} hair {to}|Give {whom} {to} hair|[Now|The same] with {to} hair|"
    "{to} hair[ instead|, please]|Restyle {whose} hair: {to}]",
    "bald": "[Make {whom} bald|Remove {whose} hair|Shave {whose} head|Take the hair away|The same, but bald]",
    "direction": "[[Turn|Flip] {whom} [around |]to face {to}|[Make|Let] {whom} [face|look|go] to the {to}|"
    "Face {to}[ instead|]|Mirror the picture so that it faces {to}]",
}
_WHOM = {"woman": ("her", "her"), "man": ("him", "his"), "person": ("them", "their"), "thing": ("it", "its")}
# Hands, arms, legs, ears, noses.
_BODY_PARTS = (
    (0x261D, 0x261D), (0x270A, 0x270D), (0x1F442, 0x1F450), (0x1F485, 0x1F485), (0x1F4AA, 0x1F4AA), (0x1F590, 0x1F596),
    (0x1F64C, 0x1F64C), (0x1F64F, 0x1F64F), (0x1F90C, 0x1F91F), (0x1F932, 0x1F933), (0x1F9B5, 0x1F9BB), (0x1FAF0, 0x1FAF8),
)  # fmt: skip


class Edit(NamedTuple):
    """Two drawings that differ in one attribute."""

    attribute: str
    origin: str
    to: str
    source: Drawing
    target: Drawing


@dataclass(frozen=True)
class Looks:
    """A drawing of one person, attribute by attribute; "" where it has none."""

    activity: tuple[int, ...]
    tone: str
    gender: str
    hair: str
    direction: str


_FIELDS = {"skin tone": "tone", "gender": "gender", "hair": "hair", "direction": "direction"}


def edits(world: World, split: str) -> Iterator[MojiDocument | None]:
    """Source, instruction, result; every pair of an attribute once before one comes again."""
    pairs = {
        name: cycled(world.shuffled(found, "edits", split)) for name, found in edits_of(world, split).items() if found
    }
    for draw in world.draws("edits", split):
        if not pairs:
            return
        (name,) = draw.choices(list(pairs), [SHARES[name] for name in pairs])
        edit = next(pairs[name])
        source, target = (world.studio.png(drawing.hexcode) for drawing in (edit.source, edit.target))
        if source == target:  # a few drawings look the same for both genders
            yield None
        else:
            yield MojiDocument(segments=(source, instruction(edit, draw), target), metadata=metadata_of(edit))


def edits_of(world: World, split: str) -> dict[str, list[Edit]]:
    """All edits of a split, by attribute, in the order of the drawings."""
    sources = SPLITS[: SPLITS.index(split) + 1]
    return {
        attribute: [edit for edit in found if edit.target.split == split and edit.source.split in sources]
        for attribute, found in _all_edits(world.drawings).items()
    }


def instruction(edit: Edit, draw: random.Random) -> str:
    """An instruction in words, one of many."""
    looks = looks_of(edit.source)
    assert looks is not None
    is_part = any(low <= looks.activity[0] <= high for low, high in _BODY_PARTS)
    whom, whose = _WHOM["thing" if is_part else looks.gender]
    kind = "bald" if edit.to == "bald" else edit.attribute
    return sentence(phrase(draw, _INSTRUCTIONS[kind], to=edit.to, origin=edit.origin, whom=whom, whose=whose))


def metadata_of(edit: Edit) -> dict[str, str]:
    """What changes, and the two drawings."""
    return {
        "attribute": edit.attribute,
        "from": edit.origin or "plain",
        "to": edit.to,
        "source": edit.source.hexcode,
        "target": edit.target.hexcode,
        "caption": edit.target.caption,
    }


def looks_of(drawing: Drawing) -> Looks | None:
    """The attributes of a drawing; None for several people and two skin tones."""
    points = drawing.code_points
    people = [point for point in points if point in (_MAN, _WOMAN, _PERSON, _BLOND_PERSON)]
    several = len(people) > 1 or drawing.name.startswith(("men_", "women_", "people_"))  # women wrestling
    if several or len(drawing.tones) > 1:
        return None
    female, male = {_WOMAN, _FEMALE} & set(points), {_MAN, _MALE} & set(points)
    rest = tuple(_PERSON if point in people else point for point in drawing.subject_key if point not in _HAIR)
    turned = _RIGHT in points and len(points) > 1
    left_out = {_FEMALE, _MALE, _JOINER} | ({_RIGHT} if turned else set())
    activity = tuple(point for point in rest if point not in left_out)
    if not activity:  # the signs of Venus and Mars
        return None
    return Looks(
        activity=activity,
        tone=tone_of(drawing),
        gender="woman" if female else "man" if male else "person",
        hair="blond" if _BLOND_PERSON in points else next((_HAIR[point] for point in points if point in _HAIR), ""),
        direction="right" if turned else "left",
    )


@lru_cache(maxsize=4)
def _all_edits(drawings: tuple[Drawing, ...]) -> dict[str, list[Edit]]:
    looks = {drawing: found for drawing in drawings if (found := looks_of(drawing)) is not None}
    edits: dict[str, list[Edit]] = {}
    for attribute, name in _FIELDS.items():
        without: dict[str, Any] = {name: ""}
        groups: dict[Looks, list[tuple[str, Drawing]]] = {}
        for drawing, of_drawing in looks.items():
            value = getattr(of_drawing, name)
            groups.setdefault(replace(of_drawing, **without), []).append((value, drawing))
        edits[attribute] = [
            Edit(attribute, origin, to, source, target)
            for members in groups.values()
            for origin, source in members
            for to, target in members
            # To take a hair style away says nothing about what comes instead; nobody is turned into "a person".
            if origin != to and to and "person" not in (origin, to)
        ]
    return edits
