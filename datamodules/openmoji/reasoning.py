"""Reasoning before drawing (NextFlow 6.4, figure 19): a request that has to be thought about, the thought, then the picture.

    Draw the clock two hours after one o'clock.
    The user wants an image of a clock. Two hours after one o'clock it is three o'clock. The final prompt is: three o'clock.

The request is given; thought and picture are trained on.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nextflow.datamodules.openmoji.catalogue import Drawing
from nextflow.datamodules.openmoji.phrases import NUMBERS, counted, phrase, plural, sentence, with_article
from nextflow.datamodules.openmoji.scenes import MAX_OBJECTS, Group, Scene, picture_of, placed_scene, split_of_scene
from nextflow.datamodules.openmoji.stories import CLOCK, MOON, ZODIAC
from nextflow.datamodules.openmoji.things import Thing, things_of
from nextflow.datamodules.openmoji.world import TONE_ORDER, MojiDocument, World

_TRIES = 200
_MIXTURES = {("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple"}
_RIDDLES = {
    "cow": "gives milk",
    "honeybee": "makes honey",
    "spider": "spins a web",
    "camel": "carries humps through the desert",
    "giraffe": "has a very long neck",
    "kangaroo": "carries its young in a pouch",
    "owl": "hunts at night and turns its head",
    "snail": "carries its house",
    "zebra": "wears black and white stripes",
    "elephant": "has a trunk",
    "penguin": "wears a tailcoat and cannot fly",
    "bat": "sleeps upside down",
    "rooster": "wakes the farm in the morning",
    "lion": "is called the king of the animals",
    "umbrella": "keeps the rain off",
    "key": "opens a lock",
    "bell": "rings",
    "candle": "has a wick and gives light",
    "camera": "takes photographs",
    "ladder": "is climbed rung by rung",
    "hammer": "drives nails",
    "anchor": "holds a ship",
    "violin": "is played with a bow",
    "trophy": "goes to the winner",
    "rocket": "flies to the moon",
    "bicycle": "has two wheels and pedals",
    "ambulance": "brings the sick to hospital",
    "cactus": "grows in the desert and stings",
    "carrot": "is orange and loved by rabbits",
    "lemon": "is yellow and sour",
    "egg": "is laid by a hen",
    "banana": "is yellow, curved and loved by monkeys",
}


class Task(NamedTuple):
    """A request and its solution."""

    kind: str
    request: str
    subject: str
    """What the user wants an image of, seen from afar."""
    thought: str
    result: Drawing | Scene
    prompt: str
    """The solution in words."""


def reasoning(world: World, split: str) -> Iterator[MojiDocument | None]:
    """Request, thought, picture."""
    things = things_of(world.drawings)
    for draw in world.draws("reasoning", split):
        for _ in range(_TRIES):
            task = draw.choice(_TASKS)(world, things, draw)
            if task is None:
                continue
            result = task.result
            if (result.split if isinstance(result, Drawing) else split_of_scene(result)) == split:
                yield _document(world, task)
                break
        else:
            yield None


def _document(world: World, task: Task) -> MojiDocument:
    thought = f" The user wants an image of {task.subject}. {task.thought} The final prompt is: {task.prompt}."
    shown: dict[str, Any]
    if isinstance(task.result, Drawing):
        shown, picture = {"hexcode": task.result.hexcode}, world.studio.png(task.result.hexcode)
    else:
        shown, picture = task.result.metadata(), picture_of(world, task.result)
    return MojiDocument(
        segments=(task.request, thought, picture),
        metadata={"kind": task.kind, "caption": task.prompt, **shown},
        prompt=1,
    )


def _clock(world: World, things: list[Thing], draw: random.Random) -> Task | None:
    start, steps = draw.randrange(len(CLOCK)), draw.choice([1, 2, 4, 6, 8, 10])
    sign = draw.choice([1, -1])
    names = [CLOCK[start], CLOCK[(start + sign * steps) % len(CLOCK)]]
    if not all(name in world.by_name for name in names):
        return None
    before, after = (world.by_name[name] for name in names)
    time = "half an hour" if steps == 1 else "an hour" if steps == 2 else f"{NUMBERS[steps // 2]} hours"
    relation = f"{time} {'after' if sign > 0 else 'before'} {before.subject}"
    request = phrase(draw, "[Draw|Show me|I need] [the|a] clock {relation}.", relation=relation)
    return Task("clock", request, "a clock", sentence(f"{relation} it is {after.subject}"), after, after.caption)


def _sum(world: World, things: list[Thing], draw: random.Random) -> Task | None:
    if not things:
        return None
    thing, total = draw.choice(things), draw.randint(2, MAX_OBJECTS)
    first = draw.randint(1, total - 1)
    many, rest = plural(thing.noun), total - first
    a, b, c = NUMBERS[first], NUMBERS[rest], NUMBERS[total]
    scene = placed_scene(
        "count", (Group(thing=thing, count=total, place=""),), "white", _square(world), draw, world.alignment
    )
    if draw.random() < 0.7:
        request, thought = f"[Draw|Show me|I want] {a} plus {b} {many}.", f"{a} plus {b} is {c}"
    else:
        request, thought = (
            f"[Draw|Show me] {a} more than {b} {thing.noun if rest == 1 else many}.",
            f"{a} more than {b} is {c}",
        )
    return Task("sum", phrase(draw, request), many, sentence(thought), scene, counted(total, thing.noun))


def _next(world: World, things: list[Thing], draw: random.Random) -> Task | None:
    order, what, the = draw.choice([(MOON, "phase of the moon", "the "), (ZODIAC, "sign of the zodiac", "")])
    start, step = draw.randrange(len(order)), draw.choice([1, -1])
    names = [order[start], order[(start + step) % len(order)]]
    if not all(name in world.by_name for name in names):
        return None
    known, wanted = (world.by_name[name] for name in names)
    relation = "after" if step > 0 else "before"
    request = phrase(draw, f"[Draw|Show me] the {what} [that comes |]{relation} {the}{known.subject}.")
    thought = f"{'Next after' if step > 0 else 'Just before'} {the}{known.subject} comes {the}{wanted.subject}."
    return Task("order", request, f"a {what}", thought, wanted, wanted.caption)


def _shade(world: World, things: list[Thing], draw: random.Random) -> Task | None:
    toned = [drawing for drawing in world.drawings if len(drawing.tones) == 1]
    if not toned:
        return None
    wanted, step = draw.choice(toned), draw.choice([1, -1])
    place = TONE_ORDER.index(wanted.tones[0]) - step
    if not 0 <= place < len(TONE_ORDER):
        return None
    relation = f"one shade {'darker' if step > 0 else 'lighter'} than {TONE_ORDER[place]}"
    request = phrase(
        draw,
        "[Draw this|Please draw|I want]: {subject}, skin tone {relation}.",
        subject=wanted.subject,
        relation=relation,
    )
    thought = sentence(f"{relation} is {wanted.tones[0]}")
    return Task("shade", request, f"\u201c{wanted.subject}\u201d", thought, wanted, wanted.caption)


def _sides(world: World, things: list[Thing], draw: random.Random) -> Task | None:
    if len(things) < 2:
        return None
    first, second = draw.sample(things, 2)
    sides = draw.choice([("left", "right"), ("top", "bottom")])
    groups = (Group(thing=first, count=1, place=sides[0]), Group(thing=second, count=1, place=sides[1]))
    scene = placed_scene("pair", groups, "white", _square(world), draw, world.alignment)
    a, b = with_article(first.noun), with_article(second.noun)
    on = "on the" if sides[0] == "left" else "at the"
    told = draw.choice([(second.noun, sides[1], first.noun, sides[0]), (first.noun, sides[0], second.noun, sides[1])])
    request = phrase(draw, "[Draw|Show me] {a} and {b}. The {noun} [belongs|goes|must be] {on} {side}.",
                     a=b, b=a, noun=told[0], on=on, side=told[1])  # fmt: skip
    thought = f"The {told[0]} is {on} {told[1]}, so the {told[2]} is {on} {told[3]}."
    prompt = f"{a} to the left of {b}" if sides[0] == "left" else f"{a} above {b}"
    return Task("sides", request, f"{b} and {a}", thought, scene, prompt)


def _mix(world: World, things: list[Thing], draw: random.Random) -> Task | None:
    colours = list(draw.choice(list(_MIXTURES)))
    mixed = _MIXTURES[colours[0], colours[1]]
    wanted = [thing for thing in things if thing.colour == mixed and thing.plain_noun in ("circle", "square", "heart")]
    if not wanted:
        return None
    thing = draw.choice(wanted)
    draw.shuffle(colours)
    request = phrase(
        draw,
        "[Draw|Show me] a {noun} in the colour that {x} and {y} [make|give].",
        noun=thing.plain_noun,
        x=colours[0],
        y=colours[1],
    )
    thought = f"{colours[0].capitalize()} and {colours[1]} make {mixed}."
    return Task("colour", request, f"a {thing.plain_noun}", thought, thing.drawing, thing.drawing.caption)


def _riddle(world: World, things: list[Thing], draw: random.Random) -> Task | None:
    known = [thing for thing in things if thing.noun in _RIDDLES]
    if not known:
        return None
    thing = draw.choice(known)
    what = "thing" if thing.kind in ("object", "food", "vehicle") else thing.kind
    clue = _RIDDLES[thing.noun]
    request = phrase(draw, "[Draw|Show me|I am looking for] the {what} that {clue}.", what=what, clue=clue)
    thought = f"The {what} that {clue} is the {thing.noun}."
    return Task("riddle", request, with_article(what), thought, thing.drawing, thing.drawing.caption)


_TASKS: tuple[Callable[[World, list[Thing], random.Random], Task | None], ...] = (
    _clock, _sum, _sum, _next, _shade, _sides, _mix, _riddle,
)  # fmt: skip


def _square(world: World) -> tuple[int, int]:
    return world.schedule.pixels(world.studio.size)
