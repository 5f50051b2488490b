"""Reasoning: request, thought and picture in the paper's pattern, and a prompt that says what is drawn."""

import re
from itertools import islice

import pytest

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.phrases import NUMBERS
from nextflow.datamodules.openmoji.reasoning import reasoning
from nextflow.datamodules.openmoji.stories import CLOCK
from nextflow.datamodules.openmoji.world import kept


@pytest.mark.parametrize("split", SPLITS)
def test_the_thought_ends_in_the_prompt_of_the_picture(world, split):
    by_hexcode = {drawing.hexcode: drawing for drawing in world.drawings}
    documents = list(islice(kept(reasoning(world, split)), 90 if split == "train" else 12))
    kinds = set()
    for document in documents:
        request, thought, picture = document.segments
        shown = document.metadata
        kinds.add(shown["kind"])
        assert document.prompt == 1 and request.endswith(".")
        pattern = r" The user wants an image of .+\. .+ The final prompt is: (.+)\."
        assert re.fullmatch(pattern, thought)[1] == shown["caption"]
        if "hexcode" in shown:
            drawing = by_hexcode[shown["hexcode"]]
            assert drawing.split == split and drawing.caption == shown["caption"]
            assert picture == world.studio.png(drawing.hexcode)
        if shown["kind"] == "sum":
            numbers = [NUMBERS.index(word) for word in re.findall(r"\w+", thought.lower()) if word in NUMBERS]
            assert numbers[0] + numbers[1] == numbers[2] == len(shown["objects"])
        if shown["kind"] == "clock":
            before = re.search(r"(after|before) (.+)\.", request)
            hours = re.search(r"(half an hour|an hour|(\w+) hours)", request)
            steps = {"half an hour": 1, "an hour": 2}.get(hours[1]) or 2 * NUMBERS.index(hours[2])
            places = [
                CLOCK.index(name.replace("'", "\u2019").replace(" o", "_o")) for name in (before[2], shown["caption"])
            ]
            assert (places[1] - places[0]) % 24 == (steps if before[1] == "after" else -steps) % 24
    if split == "train":
        assert kinds == {"clock", "sum", "order", "shade", "sides", "colour", "riddle"}
