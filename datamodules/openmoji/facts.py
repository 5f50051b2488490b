"""Plain text of OpenMoji: facts about the drawings and what they are called in other languages, from the installed packages."""

import random
from collections.abc import Iterator
from importlib import import_module

from nextflow.datamodules.openmoji.catalogue import Drawing
from nextflow.datamodules.openmoji.phrases import NUMBERS, phrase, sentence, with_article
from nextflow.datamodules.openmoji.stories import CLOCK, MOON, ZODIAC
from nextflow.datamodules.openmoji.things import things_of
from nextflow.datamodules.openmoji.world import MojiDocument, World

LANGUAGES = {
    "es": "Spanish", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "it": "Italian", "fr": "French", "de": "German",
    "fa": "Persian", "id": "Indonesian", "zh": "Chinese", "ru": "Russian", "tr": "Turkish", "ar": "Arabic",
}  # fmt: skip
MAX_SENTENCES = 5


def facts(world: World, split: str) -> Iterator[MojiDocument]:
    """One to five sentences, of drawings of the split alone."""
    names = _names(world.languages)
    drawings = [drawing for drawing in world.drawings if drawing.split == split]
    for draw in world.draws("text", split):
        if not drawings:
            return
        drawing = draw.choice(drawings)
        known = [*_about(drawing, names.get(drawing.code_points, {}), draw), *_beside(world, drawing, draw)]
        if draw.random() < 0.2:
            known.append(_arithmetic(draw))
        draw.shuffle(known)
        told = known[: draw.randint(1, MAX_SENTENCES)]
        yield MojiDocument(segments=(" ".join(map(sentence, told)),), metadata={"hexcode": drawing.hexcode})


def _names(languages: tuple[str, ...]) -> dict[tuple[int, ...], dict[str, str]]:
    """Names by code points and language."""
    emoji = import_module("emoji")
    for language in languages:
        emoji.config.load_language(language)
    return {
        tuple(ord(letter) for letter in text if letter != "\ufe0f"): {
            language: values[language].strip(":").replace("_", " ") for language in languages if language in values
        }
        for text, values in emoji.EMOJI_DATA.items()
    }


def _about(drawing: Drawing, names: dict[str, str], draw: random.Random) -> Iterator[str]:
    """What the packages say of a drawing."""
    it = drawing.caption
    yield phrase(
        draw,
        "[The|In OpenMoji, the] [drawing|emoji] \u201c{it}\u201d [belongs to|is in] the group {group}",
        it=it,
        group=drawing.group,
    )
    for language in draw.sample(list(names), min(2, len(names))):
        quoted = "\u201c{name}\u201d"
        template = f"[In {{language}}, {{it}} is [called |]{quoted}|The {{language}} [for|name of] {{it}} is {quoted}]"
        yield phrase(draw, template, language=LANGUAGES[language], it=it, name=names[language])
    if drawing.tones:
        yield phrase(
            draw,
            "the drawing \u201c{it}\u201d [shows|has] {tones} skin",
            it=drawing.subject,
            tones=" and ".join(drawing.tones),
        )


def _beside(world: World, drawing: Drawing, draw: random.Random) -> Iterator[str]:
    """Where it stands in an order."""
    for order, noun in ((CLOCK, ""), (MOON, "the "), (ZODIAC, "")):
        if drawing.name in order:
            after = world.by_name.get(order[(order.index(drawing.name) + 1) % len(order)])
            if after is not None and after.split == drawing.split:
                yield phrase(
                    draw,
                    "[After {it} comes {after}|{it} comes before {after}]",
                    it=noun + drawing.subject,
                    after=noun + after.subject,
                )
    for thing in things_of([drawing]):
        yield f"the {thing.noun} is {with_article(thing.kind)}"
        if thing.colour:
            yield phrase(draw, "a {noun} is {colour}", noun=thing.noun, colour=thing.colour)


def _arithmetic(draw: random.Random) -> str:
    first, second = draw.randint(0, 6), draw.randint(0, 6)
    return f"{NUMBERS[first]} plus {NUMBERS[second]} is {NUMBERS[first + second]}"
