"""Questions about pictures with their answers: what is there, how many, where, in which colour, yes or no.

About composed scenes, whose graph knows every answer, and about single drawings. Answers alone are trained on.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nextflow.datamodules.openmoji.phrases import NUMBERS, listed, phrase, plural, with_article
from nextflow.datamodules.openmoji.scenes import MAX_OBJECTS, Group, Scene, picture_of, sampled_scenes
from nextflow.datamodules.openmoji.things import Thing, things_of
from nextflow.datamodules.openmoji.words import caption_of_scene, words_of
from nextflow.datamodules.openmoji.world import TONE_ORDER, MojiDocument, World, tone_of

# An owl is a bird and a poodle a dog: nobody asks for these where they may be there under another name.
_GENERAL = ("bird", "bug", "fish", "dog", "bus", "pig", "cat", "deer")


class Question(NamedTuple):
    """What is asked, and the one right answer."""

    kind: str
    text: str
    answer: str


def questions(world: World, split: str) -> Iterator[MojiDocument | None]:
    """Picture, question, answer; two of three about scenes."""
    of_scenes, of_drawings = _about_scenes(world, split), _about_drawings(world, split)
    for draw in world.draws("questions", split):
        first, second = (of_scenes, of_drawings) if draw.random() < 0.67 else (of_drawings, of_scenes)
        yield next(first, None) or next(second, None)


def _about_scenes(world: World, split: str) -> Iterator[MojiDocument | None]:
    things = things_of(world.drawings)
    for scene, draw in sampled_scenes(world, split, "questions/scenes"):
        if scene is None:
            yield None
            continue
        asked = [ask for ask in _SCENE_QUESTIONS if ask(scene, things, draw) is not None]
        question = draw.choice(asked)(scene, things, draw)
        assert question is not None
        yield _document(picture_of(world, scene), question, scene.metadata())


def _about_drawings(world: World, split: str) -> Iterator[MojiDocument]:
    drawings = [drawing for drawing in world.drawings if drawing.split == split]
    groups = sorted({drawing.group for drawing in world.drawings})
    for draw in world.draws("questions/drawings", split):
        if not drawings:
            return
        drawing = draw.choice(drawings)
        asked: list[tuple[str, str, str]] = [
            ("name", "[What is this?|What do you see?|What does the picture show?|Name it.]", drawing.caption),
            ("group", "[Which|What] group does [this|it] belong to?", drawing.group),
        ]
        guess = draw.choice([drawing.group, draw.choice(groups)])
        doubt = f"[Does [this|it] belong to|Is [this|it] in] the group {guess}?"
        asked.append(("yes or no", doubt, _yes(guess == drawing.group)))
        if drawing.tones:
            asked.append(("skin tone", "[Which|What] skin tone [is this|do you see]?", " and ".join(drawing.tones)))
        if len(drawing.tones) == 1:
            tone = draw.choice([tone_of(drawing), draw.choice(TONE_ORDER)])
            asked.append(("yes or no", f"Is the skin [tone |]{tone}?", _yes(tone == tone_of(drawing))))
        kind, template, answer = draw.choice(asked)
        question = Question(kind, phrase(draw, template), answer)
        yield _document(
            world.studio.png(drawing.hexcode), question, {"hexcode": drawing.hexcode, "caption": drawing.caption}
        )


def _document(picture: bytes, question: Question, shown: dict) -> MojiDocument:
    return MojiDocument(
        # The answer brings its own space, so that a question can be asked without one.
        segments=(picture, question.text, f" {question.answer}"),
        metadata={"kind": question.kind, "question": question.text, "answer": question.answer, **shown},
        prompt=2,
    )


def _ask_caption(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    text = phrase(draw, "[Describe the picture.|What is in the picture?|Write a caption.]")
    return Question("caption", text, caption_of_scene(scene, draw))


def _ask_number(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    group = draw.choice(scene.groups)
    many = plural(group.thing.noun)
    text = phrase(draw, "[How many {many} [are there|do you see|are in the picture]?|Count the {many}.]", many=many)
    return Question("number", text, NUMBERS[group.count])


def _ask_total(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    text = phrase(draw, "How many things [are there|do you see|are in the picture][ in all| altogether|]?")
    return Question("number", text, NUMBERS[len(scene.objects)])


def _ask_presence(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    shown = draw.choice(scene.groups).thing
    asked = draw.choice([shown, draw.choice([thing for thing in things if thing.noun not in _GENERAL])])
    # A police car is a car; a red heart is no blue heart.
    nouns = [group.thing.noun for group in scene.groups]
    answer = any(noun == asked.noun or noun.endswith(f" {asked.noun}") for noun in nouns)
    text = phrase(draw, "[Is there|Do you see|Can you see] {a}[ in the picture|]?", a=with_article(asked.noun))
    return Question("yes or no", text, _yes(answer))


def _ask_count_guess(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    group = draw.choice(scene.groups)
    guess = draw.choice([group.count, draw.randint(1, MAX_OBJECTS)])
    guessed = words_of(Group(thing=group.thing, count=guess, place=""))
    text = phrase(draw, "[Are there|Do you see] exactly {guessed}?" if guess > 1 else "Is there exactly one {noun}?",
                  guessed=guessed, noun=group.thing.noun)  # fmt: skip
    return Question("yes or no", text, _yes(guess == group.count))


def _ask_colour(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    coloured = [group for group in scene.groups if group.thing.colour]
    nouns = [group.thing.plain_noun for group in scene.groups]
    clear = [group for group in coloured if nouns.count(group.thing.plain_noun) == 1]
    if not clear:
        return None
    group = draw.choice(clear)
    noun = group.thing.plain_noun if group.count == 1 else plural(group.thing.plain_noun)
    be = "is" if group.count == 1 else "are"
    return Question("colour", phrase(draw, f"[What|Which] colour {be} the {noun}?"), group.thing.colour)


def _ask_background(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    return Question("colour", phrase(draw, "[What|Which] colour is the background?"), scene.background)


def _ask_place(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    placed = [
        group for group in scene.groups if group.place in ("left", "right", "top", "bottom") or "corner" in group.place
    ]
    if not placed:
        return None
    group = draw.choice(placed)
    preposition = "in" if "corner" in group.place else "on" if group.place in ("left", "right") else "at"
    if draw.random() < 0.5:
        text = phrase(
            draw, "What [is|do you see] {preposition} the {place}?", preposition=preposition, place=group.place
        )
        return Question("object", text, words_of(group))
    noun = group.thing.noun if group.count == 1 else plural(group.thing.noun)
    text = phrase(draw, "Where {be} the {noun}?", be="is" if group.count == 1 else "are", noun=noun)
    return Question("place", text, f"{preposition} the {group.place}")


def _ask_order(scene: Scene, things: list[Thing], draw: random.Random) -> Question | None:
    if scene.layout != "row":
        return None
    where = "from left to right" if scene.groups[0].place.endswith("across") else "from top to bottom"
    return Question(
        "order",
        phrase(draw, "[What is there {where}?|Name the things {where}.]", where=where),
        listed(list(map(words_of, scene.groups))),
    )


_SCENE_QUESTIONS: tuple[Callable[[Scene, list[Thing], random.Random], Question | None], ...] = (
    _ask_caption, _ask_number, _ask_number, _ask_total, _ask_presence, _ask_count_guess, _ask_colour, _ask_background,
    _ask_place, _ask_place, _ask_order,
)  # fmt: skip


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
