"""Stories: ordered pictures with text before each, at most five, of one split."""

import io
from itertools import islice, pairwise

import pytest
from PIL import Image

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.stories import CLOCK, MAX_PICTURES, MOON, ZODIAC, stories
from nextflow.datamodules.openmoji.world import TONE_ORDER, kept


@pytest.fixture(scope="module")
def documents(world):
    return {split: list(islice(kept(stories(world, split)), 120 if split == "train" else 20)) for split in SPLITS}


def test_text_stands_before_each_of_up_to_five_pictures(documents):
    for split in SPLITS:
        for document in documents[split]:
            texts, pictures = document.segments[::2], document.segments[1::2]
            assert 2 <= len(pictures) == len(texts) <= MAX_PICTURES
            assert all(isinstance(text, str) and text.endswith(".") for text in texts)
            assert all(Image.open(io.BytesIO(picture)).size == (64, 64) for picture in pictures)
            assert len(set(pictures)) == len(pictures)


def test_pictures_are_those_of_the_metadata_in_the_order_of_their_series(world, documents):
    names = {drawing.hexcode: drawing for drawing in world.drawings}
    seen = set()
    for document in documents["train"]:
        shown = document.metadata
        seen.add(shown["series"])
        if shown["series"] == "counting":
            counts = [len(scene["objects"]) for scene in shown["pictures"]]
            assert counts == shown["numbers"] and {abs(a - b) for a, b in pairwise(counts)} == {1}
            continue
        drawings = [names[hexcode] for hexcode in shown["pictures"]]
        assert list(document.segments[1::2]) == [world.studio.png(drawing.hexcode) for drawing in drawings]
        for order, topic in ((CLOCK, "clock"), (MOON, "moon"), (ZODIAC, "zodiac")):
            if shown["series"] == topic:
                places = [order.index(drawing.name) for drawing in drawings]
                assert all((b - a) % len(order) == shown["step"] for a, b in pairwise(places))
                assert all(drawing.subject in text.lower() for drawing, text in zip(drawings, document.segments[::2]))
        if shown["series"] == "skin tones":
            places = [TONE_ORDER.index(drawing.tones[0]) for drawing in drawings]
            assert places in (sorted(places), sorted(places, reverse=True))
            assert len({drawing.subject_key for drawing in drawings}) == 1
        if shown["series"] == "flags":
            assert [d.name for d in drawings] == sorted(d.name for d in drawings) and len(
                {d.name[0] for d in drawings}
            ) == 1
    assert {"clock", "moon", "zodiac", "keycaps", "flags", "counting"} <= seen and len(seen) > 8


def test_no_picture_of_a_held_out_split_is_in_training(world, documents):
    splits = {drawing.hexcode: drawing.split for drawing in world.drawings}
    for split in SPLITS:
        for document in documents[split]:
            shown = document.metadata["pictures"]
            hexcodes = {one for one in shown if isinstance(one, str)}
            hexcodes |= {thing["hexcode"] for one in shown if not isinstance(one, str) for thing in one["objects"]}
            found = {splits[hexcode] for hexcode in hexcodes}
            if split == "train":
                assert found == {"train"}
            elif split == "validation":
                assert "validation" in found and "compositional" not in found
