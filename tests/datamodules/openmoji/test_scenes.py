"""Scenes: the picture, the words and the metadata say the same, and held-out combinations stay out of training."""

import io
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.phrases import counted, plural
from nextflow.datamodules.openmoji.scenes import MAX_OBJECTS, sampled_scenes, scenes, split_of_scene
from nextflow.datamodules.openmoji.studio import BACKGROUNDS, Placed
from nextflow.datamodules.openmoji.things import things_of
from nextflow.datamodules.openmoji.words import caption_of_scene
from nextflow.datamodules.openmoji.world import kept


@pytest.fixture(scope="module")
def documents(world):
    return {split: list(islice(kept(scenes(world, split)), 80 if split == "train" else 25)) for split in SPLITS}


def test_things_have_nouns_and_drawings(world):
    things = things_of(world.drawings)
    assert len(things) > 240 and len({thing.noun for thing in things}) == len(things)
    assert len({thing.drawing.hexcode for thing in things}) == len(things)
    assert {thing.colour for thing in things} >= {"", "red", "blue", "green", "yellow", "black", "white"}
    assert all(plural(thing.noun) and not thing.drawing.tones for thing in things)


def test_the_picture_is_drawn_again_from_the_metadata_alone(world, documents):
    for split in SPLITS:
        for document in documents[split]:
            shown = document.metadata
            objects = tuple(Placed(one["hexcode"], tuple(one["box"])) for one in shown["objects"])
            assert world.studio.compose(tuple(shown["size"]), shown["background"], objects) == document.segments[1]
            pixels_HWC = np.array(Image.open(io.BytesIO(document.segments[1])))
            assert list(pixels_HWC.shape) == [*shown["size"], 3]
            assert shown["background_rgb"] == list(BACKGROUNDS[shown["background"]])
            outside = np.ones(shown["size"], dtype=bool)
            for left, top, right, bottom in (one["box"] for one in shown["objects"]):
                assert 0 <= left < right <= shown["size"][1] and 0 <= top < bottom <= shown["size"][0]
                assert outside[top:bottom, left:right].all()  # no two boxes overlap
                assert (pixels_HWC[top:bottom, left:right] != shown["background_rgb"]).any()
                outside[top:bottom, left:right] = False
            assert (pixels_HWC[outside] == shown["background_rgb"]).all()


def test_numbers_and_places_are_those_of_the_objects(documents):
    for document in documents["train"]:
        shown = document.metadata
        height, width = shown["size"]
        counts = Counter(one["hexcode"] for one in shown["objects"])
        assert counts == {group["hexcode"]: group["count"] for group in shown["groups"]}
        assert 1 <= len(shown["objects"]) <= MAX_OBJECTS
        for group in shown["groups"]:
            boxes = [one["box"] for one in shown["objects"] if one["hexcode"] == group["hexcode"]]
            for left, top, right, bottom in boxes:
                x, y = (left + right) / 2, (top + bottom) / 2
                assert "left" not in group["place"] or x < width / 2
                assert "right" not in group["place"] or x > width / 2
                assert "top" not in group["place"] or y < height / 2
                assert "bottom" not in group["place"] or y > height / 2
        if shown["layout"] == "row":
            axis = 0 if shown["groups"][0]["place"].endswith("across") else 1
            starts = [one["box"][axis] for one in shown["objects"]]
            assert starts == sorted(starts)


def test_captions_name_every_thing_number_and_background(documents):
    for split in SPLITS:
        for document in documents[split]:
            caption = document.segments[0].lower()
            assert document.metadata["caption"] == document.segments[0]
            for group in document.metadata["groups"]:
                assert counted(group["count"], group["noun"]).lower() in caption
            background = document.metadata["background"]
            assert (f"{background} background" in caption) == (background != "white")
            if document.metadata["layout"] in ("pair", "groups"):
                assert any(word in caption for word in ("left", "right", "above", "below", "top", "bottom"))
    assert {document.metadata["layout"] for document in documents["train"]} == {
        "single", "corner", "count", "pair", "groups", "row", "corners"
    }  # fmt: skip


def test_relations_are_true(world):
    """The caption's "to the left of" and "above" hold for the boxes."""
    seen = Counter()
    for scene, draw in islice(sampled_scenes(world, "train", "relations"), 60):
        if scene is None or scene.layout not in ("pair", "groups"):
            continue
        caption = caption_of_scene(scene, draw).lower()
        words = [counted(group.count, group.thing.noun).lower() for group in scene.groups]
        for relation, first in (("to the left of", 0), ("to the right of", 1), ("above", 0), ("below", 1)):
            if relation in caption:
                seen[relation] += 1
                assert caption.index(words[first]) < caption.index(relation) < caption.index(words[1 - first])
    assert len(seen) == 4


def test_splits_hold_drawings_and_combinations_out(world, documents):
    splits = {drawing.hexcode: drawing.split for drawing in world.drawings}
    for split in SPLITS:
        for document in documents[split]:
            found = {splits[one["hexcode"]] for one in document.metadata["objects"]}
            assert found == {"train"} if split != "validation" else "validation" in found
    trained, held_out = set(), set()
    for split, into in (("train", trained), ("compositional", held_out)):
        for scene, _ in islice(sampled_scenes(world, split, "scenes"), 60):
            assert scene is not None and split_of_scene(scene) == split
            if scene.layout == "count" and scene.background == "white":  # nothing but the number can be new
                into.add((scene.groups[0].thing.noun, scene.groups[0].count))
    assert trained and held_out and not trained & held_out


def test_ratios_are_those_of_the_schedule(world, documents):
    sizes = {tuple(document.metadata["size"]) for document in documents["train"]}
    possible = {world.schedule.pixels(64, height / width) for height, width in world.schedule.base_grids}
    assert sizes <= possible and len(sizes) > 5 and (64, 64) in sizes


def test_layouts_come_as_often_as_they_are_asked_for(world):
    chosen = replace(world, layouts={"single": 3, "corner": 1, "row": 0})
    found = Counter(scene.layout for scene, _ in islice(sampled_scenes(chosen, "train", "scenes"), 200) if scene)
    assert set(found) == {"single", "corner"} and 120 < found["single"] < 180


def test_aligned_drawings_stand_at_multiples_and_never_overlap(world):
    """With the stride of an image tokenizer the same drawing gives much the same codes wherever it stands."""
    aligned = replace(world, alignment=8, other_ratios=0.0)
    sides = Counter()
    for scene, _ in islice(sampled_scenes(aligned, "train", "scenes"), 120):
        assert scene is not None and scene.size == (64, 64)
        taken = np.zeros(scene.size, dtype=bool)
        for _, (left, top, right, bottom) in scene.objects:
            step = 4 if right - left == 20 else 8
            assert not any(value % step for value in (left, top, right, bottom))
            assert not taken[top:bottom, left:right].any()
            taken[top:bottom, left:right] = True
            sides[right - left] += 1
    assert set(sides) == {64, 32, 20, 16}
