"""Examples in context: three pairs change in the same way, and only the last result is to be drawn."""

from itertools import islice

import pytest

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.examples import examples
from nextflow.datamodules.openmoji.world import kept


@pytest.mark.parametrize("split", SPLITS)
def test_three_pairs_of_one_change(world, split):
    splits = {drawing.hexcode: drawing.split for drawing in world.drawings}
    documents = list(islice(kept(examples(world, split)), 15))
    assert len(documents) == 15
    for document in documents:
        asked, shown = document.metadata, document.metadata["examples"]
        assert len({(one["attribute"], one["from"], one["to"]) for one in (asked, *shown)}) == 1
        hexcodes = [one[name] for one in (*shown, asked) for name in ("source", "target")]
        assert len(set(hexcodes[1::2])) == 3
        pictures = [segment for segment in document.segments if isinstance(segment, bytes)]
        assert pictures == [world.studio.png(hexcode) for hexcode in hexcodes]
        assert [isinstance(segment, str) for segment in document.segments] == [False] * 4 + [True] + [False] * 2
        assert document.prompt == 6
        # Examples are always of training: a held-out picture is one that is asked for.
        assert {splits[hexcode] for hexcode in hexcodes[:4]} == {"train"} and splits[hexcodes[5]] == split
        assert asked["to"] not in document.segments[4].split(" ")
