"""Composed scenes of OpenMoji: one to six drawings on a canvas of any ratio, with counts, places and colours.

A scene is sampled first, as a graph of things, numbers, places and a background; its picture and its words both follow from
it, and its metadata holds all of it, so that a generated picture can be compared with the very drawings and boxes.

Scenes of training show drawings of training alone; scenes of `validation` show at least one of validation. `compositional`
scenes are of drawings of training, in a combination that training never has: a thing in a number, a thing before a background,
two things together. A hash holds out a tenth of the combinations.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nextflow.datamodules.openmoji.catalogue import unit_hash
from nextflow.datamodules.openmoji.studio import BACKGROUNDS, Placed
from nextflow.datamodules.openmoji.things import Thing, things_of
from nextflow.datamodules.openmoji.words import caption_of_scene
from nextflow.datamodules.openmoji.world import Layout, MojiDocument, World
from nextflow.sequence.scales import Grid

HELD_OUT_FRACTION = 0.1
MAX_OBJECTS = 6

Area = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the canvas."""

_PLACES: dict[str, Area] = {
    "": (0, 0, 1, 1),
    "left": (0, 0, 0.5, 1),
    "right": (0.5, 0, 1, 1),
    "top": (0, 0, 1, 0.5),
    "bottom": (0, 0.5, 1, 1),
    "top left corner": (0, 0, 0.5, 0.5),
    "top right corner": (0.5, 0, 1, 0.5),
    "bottom left corner": (0, 0.5, 0.5, 1),
    "bottom right corner": (0.5, 0.5, 1, 1),
}
_CORNERS = tuple(place for place in _PLACES if place.endswith("corner"))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Equal things side by side."""

    thing: Thing
    count: int
    place: str
    """A name of the places: left, top right corner, ...; "" for the whole canvas, a number for a place in a row."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn, before it is drawn."""

    layout: Layout
    groups: tuple[Group, ...]
    background: str
    size: tuple[int, int]
    """Height and width in pixels."""
    objects: tuple[Placed, ...]
    """In the order of the groups."""

    def metadata(self) -> dict[str, Any]:
        """The scene in plain JSON types."""
        things = [group.thing for group in self.groups for _ in range(group.count)]
        return {
            "layout": self.layout,
            "background": self.background,
            "background_rgb": list(BACKGROUNDS[self.background]),
            "size": list(self.size),
            "groups": [
                {"noun": group.thing.noun, "kind": group.thing.kind, "colour": group.thing.colour, "count": group.count,
                 "place": group.place, "hexcode": group.thing.drawing.hexcode}
                for group in self.groups
            ],
            "objects": [
                {"noun": thing.noun, "hexcode": hexcode, "box": list(box)}
                for thing, (hexcode, box) in zip(things, self.objects)
            ],
        }  # fmt: skip


def scenes(world: World, split: str) -> Iterator[MojiDocument | None]:
    """A caption, then its scene."""
    for scene, draw in sampled_scenes(world, split, "scenes"):
        if scene is None:
            yield None
            continue
        caption = caption_of_scene(scene, draw)
        yield MojiDocument(
            segments=(caption, picture_of(world, scene)), metadata={"caption": caption, **scene.metadata()}
        )


def picture_of(world: World, scene: Scene) -> bytes:
    """PNG file of a scene."""
    return world.studio.compose(scene.size, scene.background, scene.objects)


def sampled_scenes(world: World, split: str, kind: str) -> Iterator[tuple[Scene | None, random.Random]]:
    """Endless scenes of a split, each with the generator that goes on drawing for its document; None where none fits."""
    things = things_of(world.drawings)
    trained = [thing for thing in things if thing.drawing.split == "train"]
    new = [thing for thing in things if thing.drawing.split == "validation"]
    if len(trained) < MAX_OBJECTS or (split == "validation" and not new):
        return
    for draw in world.draws(kind, split):
        (layout,) = draw.choices(list(world.layouts), list(world.layouts.values()))
        base_grid = draw.choice(world.schedule.base_grids) if draw.random() < world.other_ratios else (1, 1)
        for _ in range(200):  # the layout stays: one with many things would else hardly ever pass for training
            first = draw.choice(new) if split == "validation" else None
            scene = sample_scene(world, layout, base_grid, trained, draw, first)
            if split_of_scene(scene) == split:
                yield scene, draw
                break
        else:
            yield None, draw


def split_of_scene(scene: Scene) -> str:
    """validation by its drawings, compositional by its combinations, train otherwise."""
    if any(group.thing.drawing.split != "train" for group in scene.groups):
        return "validation"
    held_out = any(unit_hash(*combination) < HELD_OUT_FRACTION for combination in _combinations(scene))
    return "compositional" if held_out else "train"


def sample_scene(
    world: World, layout: Layout, base_grid: Grid, things: list[Thing], draw: random.Random, first: Thing | None = None
) -> Scene:
    """One scene.

    Args:
        world: gives ratios and size.
        layout: how its things stand.
        base_grid: its ratio.
        things: what may be in it.
        draw: decides the rest.
        first: a thing that must be in it.
    """
    height, width = size = world.schedule.pixels(world.studio.size, base_grid[0] / base_grid[1])
    wide = width > height or (width == height and draw.random() < 0.5)
    sides = ("left", "right") if wide else ("top", "bottom")
    places: tuple[str, ...]
    if layout in ("single", "count"):
        places = ("",)
    elif layout == "corner":
        places = (draw.choice(_CORNERS),)
    elif layout == "corners":
        places = draw.choice([("top left corner", "bottom right corner"), ("top right corner", "bottom left corner")])
    elif layout == "row":
        number = draw.randint(3, 4) if max(size) > 1.5 * min(size) else 3  # four in a row of a square are tiny
        places = tuple(f"{index + 1} of {number} {'across' if wide else 'down'}" for index in range(number))
    else:
        places = sides
    counts = _counts(layout, len(places), draw)
    chosen = _choose(things, len(places), draw, first)
    groups = tuple(Group(thing=thing, count=count, place=place) for thing, count, place in zip(chosen, counts, places))
    background = draw.choice(list(BACKGROUNDS)) if draw.random() < 0.5 else "white"
    return placed_scene(layout, groups, background, size, draw, world.alignment)


def placed_scene(
    layout: Layout,
    groups: tuple[Group, ...],
    background: str,
    size: tuple[int, int],
    draw: random.Random,
    alignment: int,
) -> Scene:
    """A scene whose objects are placed where their groups belong, at multiples of `alignment` pixels."""
    objects: list[Placed] = []
    for group in groups:
        boxes = _boxes(_pixels(_area(group.place), size), group.count, draw, alignment)
        objects += [Placed(group.thing.drawing.hexcode, box) for box in boxes]
    return Scene(layout=layout, groups=groups, background=background, size=size, objects=tuple(objects))


def _counts(layout: Layout, num_groups: int, draw: random.Random) -> list[int]:
    if layout == "count":
        return [draw.randint(2, MAX_OBJECTS)]
    if layout == "groups":
        first = draw.randint(1, MAX_OBJECTS - 2)
        return [first, draw.randint(2 if first == 1 else 1, min(4, MAX_OBJECTS - first))]
    return [1] * num_groups


def _choose(things: list[Thing], number: int, draw: random.Random, first: Thing | None) -> list[Thing]:
    """Different things; three times in ten shapes alone, as colours matter most there."""
    shapes = [thing for thing in things if thing.colour]
    pool = shapes if len(shapes) >= number and draw.random() < 0.3 else things
    chosen = draw.sample(pool, number)
    if first is not None:
        chosen[draw.randrange(number)] = first
    return chosen


def _area(place: str) -> Area:
    if place in _PLACES:
        return _PLACES[place]
    index, _, number, direction = place.split(" ")
    start, end = (int(index) - 1) / int(number), int(index) / int(number)
    return (start, 0, end, 1) if direction == "across" else (0, start, 1, end)


def _pixels(area: Area, size: tuple[int, int]) -> tuple[int, int, int, int]:
    height, width = size
    left, top, right, bottom = area
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def _boxes(
    area: tuple[int, int, int, int], count: int, draw: random.Random, alignment: int
) -> list[tuple[int, int, int, int]]:
    """Squares of one size in the cells of a grid, each somewhere in its cell; they never overlap."""
    left, top, right, bottom = area
    height, width = bottom - top, right - left
    num_rows = max(range(1, count + 1), key=lambda rows: min(height / rows, width / -(-count // rows)))
    num_columns = -(-count // num_rows)
    cell_height, cell_width = height / num_rows, width / num_columns
    cell = min(cell_height, cell_width)
    step = _step(cell, alignment)
    side = max(1, int(cell * draw.uniform(0.8, 0.97))) if step == 1 else int(cell // step) * step
    boxes = []
    for index in range(count):
        row, column = divmod(index, num_columns)
        missing = num_columns - min(num_columns, count - row * num_columns)
        x = _place(left + cell_width * (column + missing / 2), cell_width - side, step, draw)
        y = _place(top + cell_height * row, cell_height - side, step, draw)
        boxes.append((x, y, x + side, y + side))
    return boxes


def _step(cell: float, alignment: int) -> int:
    """Of `alignment`, its half, its quarter, ...: the first whose multiples fill 0.8 of a cell.

    With 8: 8 for a cell of 32 px, whose drawing has 32, and 4 for a cell of 21.3 px, whose drawing has 20.
    """
    step = alignment
    while step > 1 and cell // step * step < 0.8 * cell:
        step //= 2
    return step


def _place(start: float, room: float, step: int, draw: random.Random) -> int:
    """Where a square begins that has some room in its cell."""
    if step == 1:
        return int(start + draw.uniform(0, room))
    first, last = -int(-start // step), int((start + room) // step)
    return step * (draw.randint(first, last) if first <= last else last)


def _combinations(scene: Scene) -> Iterator[tuple[object, ...]]:
    for group in scene.groups:
        if group.count > 1:
            yield "count", group.thing.drawing.code_points, group.count
        if scene.background != "white":
            yield "background", group.thing.drawing.code_points, scene.background
    for pair in combinations(sorted(group.thing.drawing.code_points for group in scene.groups), 2):
        yield "pair", *pair
