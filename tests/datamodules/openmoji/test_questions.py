"""Questions: the one right answer follows from what is drawn."""

from itertools import islice

import pytest

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.phrases import NUMBERS
from nextflow.datamodules.openmoji.questions import questions
from nextflow.datamodules.openmoji.world import kept


@pytest.fixture(scope="module")
def documents(world):
    return {split: list(islice(kept(questions(world, split)), 250 if split == "train" else 25)) for split in SPLITS}


def test_answers_alone_are_learnt(documents):
    for document in documents["train"]:
        picture, question, answer = document.segments
        assert isinstance(picture, bytes) and document.prompt == 2
        assert (question, answer) == (document.metadata["question"], f" {document.metadata['answer']}")


def test_answers_about_scenes_are_right(documents):
    checked = set()
    for document in documents["train"]:
        shown = document.metadata
        if "objects" not in shown:
            continue
        kind, question, answer = shown["kind"], shown["question"], shown["answer"]
        nouns = {group["noun"]: group["count"] for group in shown["groups"]}
        if kind == "number" and "things" in question:
            assert answer == NUMBERS[len(shown["objects"])]
            checked.add("total")
        elif kind == "number":
            assert answer in {NUMBERS[count] for count in nouns.values()}
        elif kind == "colour" and "background" in question:
            assert answer == shown["background"]
            checked.add("background")
        elif kind == "colour":
            assert f"{answer} " in " ".join(nouns)
            checked.add("colour")
        elif kind == "yes or no" and "exactly" not in question:
            words = question.rstrip("?").removesuffix(" in the picture").split(" ")
            noun = " ".join(words[words.index("an" if "an" in words else "a") + 1 :])
            assert answer == ("yes" if any(name == noun or name.endswith(f" {noun}") for name in nouns) else "no"), (
                question
            )
            checked.add(f"presence {answer}")
        elif kind == "yes or no":
            words = question.rstrip("?").split(" ")
            number = NUMBERS.index(words[words.index("exactly") + 1])
            assert answer == ("yes" if number in nouns.values() else "no") or len(nouns) > 1
            checked.add(f"exactly {answer}")
        elif kind == "place":
            assert any(answer.endswith(group["place"]) for group in shown["groups"])
            checked.add("place")
    assert checked >= {
        "total",
        "background",
        "colour",
        "presence yes",
        "presence no",
        "exactly yes",
        "exactly no",
        "place",
    }


def test_answers_about_drawings_are_right(world, documents):
    by_hexcode = {drawing.hexcode: drawing for drawing in world.drawings}
    kinds = set()
    for split in SPLITS:
        for document in documents[split]:
            shown = document.metadata
            if "objects" in shown:
                continue
            drawing = by_hexcode[shown["hexcode"]]
            assert document.segments[0] == world.studio.png(drawing.hexcode) and drawing.split == split
            kinds.add(shown["kind"])
            right = {"name": drawing.caption, "group": drawing.group, "skin tone": " and ".join(drawing.tones)}
            if shown["kind"] in right:
                assert shown["answer"] == right[shown["kind"]]
            elif "skin" in shown["question"]:
                assert (drawing.tones[0] == shown["question"].rstrip("?").split(" ")[-1]) == (shown["answer"] == "yes")
            else:
                assert (drawing.group in shown["question"]) == (shown["answer"] == "yes")
    assert kinds == {"name", "group", "skin tone", "yes or no"}
