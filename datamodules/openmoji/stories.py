"""Interleaved stories of OpenMoji: up to five pictures of an ordered series, with text before each.

Series: clock faces, phases of the moon, keycaps, signs of the zodiac, flags of one letter, hearts and shapes by colour, growing
up, weather, medals, speed, skin tones from light to dark, and a thing that becomes more and more. A story belongs to the
split of the picture that is held out most strictly.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nextflow.datamodules.openmoji.catalogue import SPLITS, Drawing
from nextflow.datamodules.openmoji.phrases import NUMBERS, counted, phrase, plural, sentence, with_article
from nextflow.datamodules.openmoji.scenes import Group, picture_of, placed_scene, split_of_scene
from nextflow.datamodules.openmoji.things import COLOURS, things_of
from nextflow.datamodules.openmoji.world import TONE_ORDER, MojiDocument, World, split_of, tone_of

MAX_PICTURES = 5
_TRIES = 500

_HOURS = NUMBERS[1:13]
CLOCK = tuple(name for hour in _HOURS for name in (f"{hour}_o\u2019clock", f"{hour}-thirty"))
MOON = (
    "new_moon", "waxing_crescent_moon", "first_quarter_moon", "waxing_gibbous_moon", "full_moon", "waning_gibbous_moon",
    "last_quarter_moon", "waning_crescent_moon",
)  # fmt: skip
ZODIAC = (
    "Aries", "Taurus", "Gemini", "Cancer", "Leo", "Virgo", "Libra", "Scorpio", "Sagittarius", "Capricorn", "Aquarius", "Pisces",
)  # fmt: skip
_FIRST = "[[It begins|We begin] with {a}|{trend} {many}: first {a}|{a}]"
_MORE = "[{change}|then|next|now]: {a}"
_AFTER = "[Then|Next|After that][:| comes| there is] {a}"
_STEPS = {1: "half an hour", 2: "an hour", 4: "two hours", 6: "three hours"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Drawings in an order, and how to speak of them."""

    topic: str
    names: tuple[str, ...]
    """Names of the package `emoji`, in order."""
    intro: str
    """Template of the text before the first picture; slots: name, a (with article), step, letter, ..."""
    after: str = _AFTER
    """Template of the text before each further picture."""
    steps: tuple[int, ...] = (1,)
    """How far one picture is from the next."""
    cyclic: bool = False
    """Whether the first comes after the last."""
    weight: float = 1.0
    """How often it is told."""
    is_proper: bool = False
    """Whether the names are written as they are."""


_SERIES = (
    Series(
        topic="clock", names=CLOCK, steps=tuple(_STEPS), cyclic=True, weight=6,
        intro="[[The|A] clock [shows|says] {name}|It is {name}|[At the beginning|First] it is {name}]",
        after="{step} later[ it is|:| the clock shows] {name}",
    ),
    Series(
        topic="moon", names=MOON, cyclic=True, weight=3,
        intro="[[Tonight there is|We see|It begins with] a {name}|The phases of the moon, beginning with the {name}]",
        after="[A few nights later|Then|Next][ it is|:| comes] the {name}",
    ),
    Series(
        topic="keycaps", names=tuple(f"keycap_{number}" for number in range(11)), steps=(1, -1, 2, -2, 3), weight=3,
        intro="[[Count|Counting] {way} from {number}{steps}|The number {number}]", after="[|Then |Next: |And ]{number}",
    ),
    Series(
        topic="zodiac", is_proper=True, names=ZODIAC, cyclic=True, weight=2,
        intro="[The [zodiac |]sign [of |]{name}|[We begin|It starts] with {name}]",
        after="[Then|Next|After it][ comes|:] {name}",
    ),
    Series(
        topic="hearts", names=tuple(f"{colour}_heart" for colour in COLOURS), steps=(1, -1), weight=1,
        intro="[Hearts [in|of] [many|changing] colours[:|, first] {a}|{a}]", after="[Then|Next|Now] {a}",
    ),
    Series(
        topic="circles", names=tuple(f"{colour}_circle" for colour in COLOURS), steps=(1, -1), weight=1,
        intro="[A circle [that changes|changes] its colour[:|, first] {a}|{a}]", after="[Then|Next|Now] {a}",
    ),
    Series(
        topic="chick", names=("egg", "hatching_chick", "baby_chick", "front-facing_baby_chick", "chicken"), weight=1,
        intro="[How a chick grows up[: first there is|. At first:] {a}|{a}]",
    ),
    Series(
        topic="tree", names=("seedling", "herb", "potted_plant", "deciduous_tree"), weight=1,
        intro="[How a tree grows[: first there is|. At first:] {a}|{a}]",
    ),
    Series(topic="woman", names=("baby", "girl", "woman", "old_woman"), weight=1, intro="[[A life|Growing up]: {a}|First {a}]"),
    Series(topic="man", names=("baby", "boy", "man", "old_man"), weight=1, intro="[[A life|Growing up]: {a}|First {a}]"),
    Series(
        topic="weather", steps=(1, -1), weight=1,
        names=("sun", "sun_behind_small_cloud", "sun_behind_large_cloud", "cloud_with_rain", "cloud_with_lightning_and_rain"),
        intro="[[The weather changes|Weather]: {name}|First: {name}]", after="[Then|Next|Later]: {name}",
    ),
    Series(
        topic="volume", steps=(1, -1), weight=1,
        names=("muted_speaker", "speaker_low_volume", "speaker_medium_volume", "speaker_high_volume"),
        intro="[The volume|How loud it is]: {name}", after="[Now|Then|Next]: {name}",
    ),
    Series(
        topic="medals", names=("3rd_place_medal", "2nd_place_medal", "1st_place_medal"), steps=(1, -1), weight=1,
        intro="[The [award ceremony|prizes]: {a}|{a}]",
    ),
    Series(
        topic="speed", weight=1,
        names=("kick_scooter", "bicycle", "motorcycle", "racing_car", "high-speed_train", "airplane", "rocket"),
        intro="[Faster and faster|From slow to fast]: {a}", after="[Faster|Even faster|Then]: {a}",
    ),
)  # fmt: skip


def stories(world: World, split: str) -> Iterator[MojiDocument | None]:
    """Text, picture, text, picture, ..."""
    series = [*_SERIES, *_flags(world), *_tones(world)]
    series = [one for one in series if sum(name in world.by_name for name in one.names) > 1]
    for draw in world.draws("stories", split):
        if draw.random() < 0.2:
            yield _counting_story(world, split, draw)
        else:
            yield _series_story(world, split, series, draw) if series else None


def _series_story(world: World, split: str, series: Sequence[Series], draw: random.Random) -> MojiDocument | None:
    for _ in range(_TRIES):
        (told,) = draw.choices(series, [one.weight for one in series])
        step = draw.choice(told.steps)
        start, length = draw.randrange(len(told.names)), draw.randint(2, MAX_PICTURES)
        places = [start + step * index for index in range(length)]
        if told.cyclic:
            places = [place % len(told.names) for place in places]
        if not 0 <= min(places) <= max(places) < len(told.names) or len(set(places)) < length:
            continue
        drawings = [world.by_name[told.names[place]] for place in places if told.names[place] in world.by_name]
        if len(drawings) == length and split_of(drawings) == split:
            segments: list[str | bytes] = []
            for index, drawing in enumerate(drawings):
                segments += [_text(told, drawing, step, index, draw), world.studio.png(drawing.hexcode)]
            metadata = {"series": told.topic, "step": step, "pictures": [drawing.hexcode for drawing in drawings]}
            return MojiDocument(segments=tuple(segments), metadata=metadata)
    return None


def _counting_story(world: World, split: str, draw: random.Random) -> MojiDocument | None:
    """The same thing, once more in every picture (or once less)."""
    things = things_of(world.drawings)
    size = world.schedule.pixels(world.studio.size)
    for _ in range(_TRIES if things else 0):
        thing, length = draw.choice(things), draw.randint(2, MAX_PICTURES)
        first = draw.randint(1, MAX_PICTURES + 1 - length)
        numbers = list(range(first, first + length))
        if draw.random() < 0.3:
            numbers.reverse()
        told = [
            placed_scene("count", (Group(thing=thing, count=number, place=""),), "white", size, draw, world.alignment)
            for number in numbers
        ]
        if SPLITS[max(SPLITS.index(split_of_scene(scene)) for scene in told)] != split:
            continue
        more = numbers[1] > numbers[0]
        segments: list[str | bytes] = []
        for number, scene in zip(numbers, told):
            template = _MORE if segments else _FIRST
            words = phrase(
                draw,
                template,
                a=counted(number, thing.noun),
                many=plural(thing.noun),
                trend="more and more" if more else "fewer and fewer",
                change="one more" if more else "one fewer",
            )
            segments += [sentence(words), picture_of(world, scene)]
        metadata = {"series": "counting", "numbers": numbers, "pictures": [scene.metadata() for scene in told]}
        return MojiDocument(segments=tuple(segments), metadata=metadata)
    return None


def _text(told: Series, drawing: Drawing, step: int, index: int, draw: random.Random) -> str:
    name = drawing.name.replace("_", " ") if told.is_proper else drawing.subject
    words = phrase(
        draw,
        told.after if index else told.intro,
        name=name,
        a=with_article(name),
        number=name.removeprefix("keycap "),
        way="up" if step > 0 else "down",
        step=_STEPS.get(step, ""),
        steps=f" in steps of {NUMBERS[abs(step)]}" if abs(step) > 1 else "",
        tone=tone_of(drawing),
        shade="darker" if step > 0 else "lighter",
        letter=name[0],
    )
    return sentence(words)


def _flags(world: World) -> list[Series]:
    """The flags of all countries that begin with the same letter."""
    letters: dict[str, list[str]] = {}
    for drawing in world.drawings:
        if drawing.subject.startswith("flag of ") and drawing.name[0].isascii():
            letters.setdefault(drawing.name[0], []).append(drawing.name)
    return [
        Series(
            topic="flags",
            names=tuple(sorted(names)),
            intro="[[Flags of places|Places] that begin with {letter}[, in order|]: {name}|The flag of {name}]",
            after="[Then|Next][:| comes][ the flag of|] {name}",
            is_proper=True,
            weight=0.2,
        )
        for letter, names in sorted(letters.items())
    ]


def _tones(world: World) -> list[Series]:
    """Each subject in its skin tones."""
    subjects: dict[tuple[int, ...], dict[str, Drawing]] = {}
    for drawing in world.drawings:
        if len(drawing.tones) == 1:
            subjects.setdefault(drawing.subject_key, {})[drawing.tones[0]] = drawing
    return [
        Series(
            topic="skin tones",
            names=tuple(tones[tone].name for tone in TONE_ORDER if tone in tones),
            intro="{name}[| in several skin tones|, drawn again and again]: {tone} skin[ tone|]",
            after="[Then|Next|A shade {shade}|Now a little {shade}]: {tone} skin[ tone|]",
            steps=(1, -1),
            weight=0.01,
        )
        for tones in subjects.values()
    ]
