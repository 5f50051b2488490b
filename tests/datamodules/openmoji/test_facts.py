"""Plain text: true sentences about drawings of the split, in several languages."""

from itertools import islice

import pytest

from nextflow.datamodules.openmoji.catalogue import SPLITS
from nextflow.datamodules.openmoji.facts import facts
from nextflow.datamodules.openmoji.world import kept


@pytest.mark.parametrize("split", SPLITS)
def test_facts_are_about_drawings_of_the_split(world, split):
    by_hexcode = {drawing.hexcode: drawing for drawing in world.drawings}
    documents = list(islice(kept(facts(world, split)), 60))
    texts = [document.segments[0] for document in documents]
    assert len(set(texts)) > 50 and any("German" in text for text in texts) and any("French" in text for text in texts)
    for document in documents:
        drawing = by_hexcode[document.metadata["hexcode"]]
        (text,) = document.segments
        assert drawing.split == split and text.endswith(".")
        if "group" in text:
            assert f"group {drawing.group}." in text
