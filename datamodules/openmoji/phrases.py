"""Small grammars for the texts of the OpenMoji sources: one template stands for many sentences.

phrase(draw, "[Give|Draw] {who} [long |]hair", who="her")   ->   "Draw her hair", "Give her long hair", ...
"""

import random
import re
from collections.abc import Sequence

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_IRREGULAR = {
    "mouse": "mice", "ox": "oxen", "goose": "geese", "wolf": "wolves", "leaf": "leaves", "knife": "knives", "fish": "fish",
    "tooth": "teeth", "foot": "feet", "deer": "deer", "moose": "moose", "bison": "bison", "squid": "squid", "child": "children",
    "shrimp": "shrimp", "hippopotamus": "hippopotamuses", "loaf": "loaves", "snowman": "snowmen", "blowfish": "blowfish",
    "jellyfish": "jellyfish", "aircraft": "aircraft", "calf": "calves", "person": "people", "man": "men", "woman": "women",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "scarf": "scarves", "dice": "dice", "sheep": "sheep",
}  # fmt: skip


def phrase(draw: random.Random, template: str, **slots: object) -> str:
    """One sentence of a template: each [a|b|c] becomes one of its alternatives (brackets nest), then {slots} are filled."""
    while match := _INNERMOST.search(template):
        template = template[: match.start()] + draw.choice(match[1].split("|")) + template[match.end() :]
    return " ".join(template.format(**slots).split())


def with_article(noun: str) -> str:
    """The noun with its indefinite article: a cat, an owl, a unicorn, a UFO."""
    vowel = noun[0].lower() in "aeiou" and not noun.startswith(("uni", "use", "one", "eu"))
    return f"{'an' if vowel else 'a'} {noun}"


def plural(noun: str) -> str:
    """More than one of it: cats, foxes, butterflies, mice."""
    *before, last = noun.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def counted(number: int, noun: str) -> str:
    """A cat, two cats, three cats."""
    return with_article(noun) if number == 1 else f"{NUMBERS[number]} {plural(noun)}"


def listed(items: Sequence[str]) -> str:
    """A cat, a dog and a fish."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
