"""Edits differ in exactly one attribute, in their code points and in what their texts and metadata say."""

from dataclasses import asdict
from itertools import islice

import pytest

from nextflow.datamodules.openmoji.catalogue import SPLITS, Drawing
from nextflow.datamodules.openmoji.edits import Looks, edits, edits_of, looks_of
from nextflow.datamodules.openmoji.world import kept

ATTRIBUTES = {"skin tone": "tone", "gender": "gender", "hair": "hair", "direction": "direction"}


@pytest.mark.parametrize(
    ("hexcode", "looks"),
    [
        ("1F469-1F3FD-200D-1F9B0", ((0x1F9D1,), "medium", "woman", "red", "left")),
        ("1F471-200D-2642-FE0F", ((0x1F9D1,), "yellow", "man", "blond", "left")),
        ("1F3C3-1F3FF-200D-2640-FE0F-200D-27A1-FE0F", ((0x1F3C3,), "dark", "woman", "", "right")),
        ("27A1", ((0x27A1,), "yellow", "person", "", "left")),
        ("1F468-200D-1F33E", ((0x1F9D1, 0x1F33E), "yellow", "man", "", "left")),
    ],
)
def test_looks(hexcode, looks):
    assert looks_of(Drawing(hexcode=hexcode, name="")) == Looks(*looks)


def test_families_and_signs_have_no_looks():
    for hexcode in ("1F468-200D-1F469-200D-1F466", "1FAF1-1F3FE-200D-1FAF2-1F3FF", "2640"):
        assert looks_of(Drawing(hexcode=hexcode, name="")) is None


def test_exactly_one_attribute_differs(world):
    for split in SPLITS:
        for attribute, found in edits_of(world, split).items():
            assert found, (split, attribute)
            for edit in found:
                source, target = asdict(looks_of(edit.source)), asdict(looks_of(edit.target))
                changed = {name for name in source if source[name] != target[name]}
                assert changed == {ATTRIBUTES[attribute]}
                assert (source[ATTRIBUTES[attribute]], target[ATTRIBUTES[attribute]]) == (edit.origin, edit.to)


def test_counts_of_the_whole_set(world):
    """Of 408 subjects in skin tones, 463 woman / man pairs, 93 drawings with hair and 108 that face right."""
    counts = {split: {name: len(found) for name, found in edits_of(world, split).items()} for split in SPLITS}
    assert counts["train"] == {"skin tone": 5584, "gender": 704, "hair": 281, "direction": 162}
    assert all(count > 5 for of_split in counts.values() for count in of_split.values())


@pytest.mark.parametrize("split", SPLITS)
def test_documents_hold_the_two_drawings_and_keep_to_their_split(world, split):
    by_hexcode = {drawing.hexcode: drawing for drawing in world.drawings}
    documents = list(islice(kept(edits(world, split)), 30))
    assert len(documents) == 30 and len({document.metadata["attribute"] for document in documents}) >= 3
    for document in documents:
        source, instruction, target = document.segments
        seen = [by_hexcode[document.metadata[name]] for name in ("source", "target")]
        assert [source, target] == [world.studio.png(drawing.hexcode) for drawing in seen] and source != target
        assert seen[1].split == split and (split != "train" or seen[0].split == "train")
        assert document.metadata["caption"] == seen[1].caption
        assert instruction[0].isupper() and instruction.endswith(".")
        if document.metadata["attribute"] == "skin tone":
            assert document.metadata["to"] in instruction.lower()
    assert len({document.segments[1] for document in documents}) > 12


def test_each_pair_comes_once_before_one_comes_again(world):
    pairs = [
        (document.metadata["source"], document.metadata["target"])
        for document in islice(kept(edits(world, "validation")), 60)
        if document.metadata["attribute"] == "skin tone"
    ]
    assert len(pairs) == len(set(pairs)) > 10


def test_the_same_documents_come_again(world):
    first, second = (list(islice(kept(edits(world, "train")), 5)) for _ in range(2))
    assert first == second
