"""The words for composed scenes: captions that say everything that the scene's graph holds."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from nextflow.datamodules.openmoji.phrases import counted, listed, phrase, sentence, with_article

if TYPE_CHECKING:
    from nextflow.datamodules.openmoji.scenes import Group, Scene

_BEFORE, _AFTER = {"left": "to the left of", "top": "above"}, {"left": "to the right of", "top": "below"}


def caption_of_scene(scene: Scene, draw: random.Random) -> str:
    """Things, numbers, places and background in one phrase or sentence, one of many."""
    text = _body(scene, draw)
    if scene.background != "white":
        paper = with_article(f"{scene.background} background")
        text = draw.choice([f"{text} on {paper}", f"{text}, on {paper}", f"on {paper}, {text}"])
    return sentence(text) if draw.random() < 0.5 else text


def _body(scene: Scene, draw: random.Random) -> str:
    words = [words_of(group) for group in scene.groups]
    first = scene.groups[0]
    if scene.layout == "single":
        return phrase(draw, "[|a drawing of |a picture of |there is ]{a}", a=words[0])
    if scene.layout == "corner":
        return phrase(
            draw, "[{a} in the {place}|in the {place}, {a}|{a}, in the {place}]", a=words[0], place=first.place
        )
    if scene.layout == "count":
        return phrase(draw, "[|a drawing of |a picture of |there are |a group of |exactly ]{a}", a=words[0])
    if scene.layout == "row":
        across = first.place.endswith("across")
        where = "from left to right" if across else "from top to bottom"
        return phrase(
            draw,
            "[{where}: {a}|{a}, {where}|{a} in a [row|line], {where}]" if across else "[{where}: {a}|{a}, {where}]",
            where=where,
            a=listed(words),
        )
    a, b = words
    if scene.layout == "corners":
        template = "[{a} in the {at} and {b} in the {to}|in the {at}, {a}; in the {to}, {b}]"
        return phrase(draw, template, a=a, b=b, at=first.place, to=scene.groups[1].place)
    if draw.random() < 0.3:
        on = "on the" if first.place == "left" else "at the"
        return phrase(
            draw, "{a} {on} {at} and {b} {on} {to}", a=a, b=b, on=on, at=first.place, to=scene.groups[1].place
        )
    if draw.random() < 0.5:
        return f"{a} {_BEFORE[first.place]} {b}"
    return f"{b} {_AFTER[first.place]} {a}"


def words_of(group: Group) -> str:
    """A cat, three dogs."""
    return counted(group.count, group.thing.noun)
