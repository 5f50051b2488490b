"""Small grammars: alternatives nest, slots are filled last, and nouns are counted in English."""

import random

import pytest

from nextflow.datamodules.openmoji.phrases import counted, listed, phrase, plural, sentence, with_article


def test_all_alternatives_are_said():
    said = {phrase(random.Random(seed), "[Give|Draw] {who} [[long|short] |]hair", who="her") for seed in range(200)}
    assert said == {f"{verb} her {hair}" for verb in ("Give", "Draw") for hair in ("hair", "long hair", "short hair")}


def test_slots_may_hold_what_would_be_an_alternative():
    assert phrase(random.Random(0), "{a}", a="[x|y] {z}") == "[x|y] {z}"


@pytest.mark.parametrize(
    ("noun", "many"),
    [("cat", "cats"), ("fox", "foxes"), ("butterfly", "butterflies"), ("monkey", "monkeys"), ("bus", "buses"),
     ("police car", "police cars"), ("wolf", "wolves"), ("goose", "geese"), ("fish", "fish"), ("torch", "torches")],
)  # fmt: skip
def test_plurals(noun, many):
    assert plural(noun) == many


def test_articles_numbers_and_lists():
    assert [with_article(noun) for noun in ("cat", "owl", "unicorn", "egg")] == [
        "a cat",
        "an owl",
        "a unicorn",
        "an egg",
    ]
    assert (counted(1, "owl"), counted(3, "owl")) == ("an owl", "three owls")
    assert (listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])) == ("a", "a and b", "a, b and c")
    assert (sentence("a cat"), sentence("who?")) == ("A cat.", "Who?")
