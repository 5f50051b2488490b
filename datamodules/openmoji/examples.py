"""Examples in context: two pairs of pictures that change in the same way, then a third picture to change (NextFlow 6.5).

Nothing says what the change is: it is to be inferred. The document belongs to the split of its result; the six pictures of a
training document are all of training.
"""

from collections.abc import Iterator

from nextflow.datamodules.openmoji.edits import SHARES, Edit, edits_of, metadata_of
from nextflow.datamodules.openmoji.phrases import phrase, sentence
from nextflow.datamodules.openmoji.world import MojiDocument, World

_TASK = (
    "[Find out|Work out|Look at|Infer] how the first picture of each [example|pair] [changes|was changed], [and|then] "
    "[do the same to the [next|following] [picture|one]|change the [next|following] [picture|one] in the same way]|"
    "[Two|2] examples of [a change|one transformation], [and|then] a picture to [change|transform] [likewise|the same way]|"
    "[Apply the same change[ as in the examples|] to|Make the same change in] the next picture"
)


def examples(world: World, split: str) -> Iterator[MojiDocument | None]:
    """Source, result, source, result, task, source, result."""
    changes: dict[str, dict[tuple[str, str], list[Edit]]] = {}
    shown: dict[tuple[str, str, str], list[Edit]] = {}
    for attribute, found in edits_of(world, "train").items():
        for edit in found:
            shown.setdefault((attribute, edit.origin, edit.to), []).append(edit)
    for attribute, found in edits_of(world, split).items():
        for edit in found:
            if len(shown.get((attribute, edit.origin, edit.to), ())) >= 3:
                changes.setdefault(attribute, {}).setdefault((edit.origin, edit.to), []).append(edit)
    for draw in world.draws("examples", split):
        if not changes:
            return
        (attribute,) = draw.choices(list(changes), [SHARES[name] for name in changes])
        origin, to = draw.choice(list(changes[attribute]))
        asked = draw.choice(changes[attribute][origin, to])
        first, second = draw.sample([edit for edit in shown[attribute, origin, to] if edit is not asked], 2)
        pictures = [
            world.studio.png(drawing.hexcode)
            for edit in (first, second, asked)
            for drawing in (edit.source, edit.target)
        ]
        if any(source == target for source, target in zip(pictures[::2], pictures[1::2])):
            yield None  # a few drawings look the same for both genders
            continue
        task = sentence(phrase(draw, f"[{_TASK}]"))
        yield MojiDocument(
            segments=(*pictures[:4], task, *pictures[4:]),
            metadata={**metadata_of(asked), "examples": [metadata_of(first), metadata_of(second)]},
            prompt=6,
        )
