"""A suite: prompts of several kinds one after another, each with its known answer."""

import pytest
import torch

from nextflow.datamodules.suite import SuiteDataModule, SuitePart


def make(shapes, edits, **options):
    parts = {
        "draw": SuitePart(shards=shapes.documents, per_split=2),
        "edit": SuitePart(shards=edits.documents),
        "name": SuitePart(shards=shapes.documents, task="text"),
    }
    return SuiteDataModule(
        **{"parts": parts, "text_tokenizer": shapes.text_tokenizer, "level": 32, "schedule": shapes.schedule, **options}
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_kinds_come_one_after_another_with_their_answers(shapes, edits, num_workers):
    suite = make(shapes, edits, per_split=3, batch_size=4, num_workers=num_workers)
    batches = list(suite.test_dataloader())
    assert all(len({prompt.kind for prompt in batch.prompts}) == 1 for batch in batches)
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    by_kind = {kind: [prompt for prompt in prompts if prompt.kind == kind] for kind in ("draw", "edit", "name")}
    assert [len(group) for group in by_kind.values()] == [4, 6, 6]
    for kind, group in by_kind.items():
        assert sorted(prompt.index for prompt in group) == list(range(len(group)))
        assert {prompt.task for prompt in group} == {"text" if kind == "name" else "image"}
    for prompt in by_kind["draw"] + by_kind["edit"]:
        (picture,) = prompt.answer
        assert torch.equal(picture.pixels_CHW, prompt.reference)
    assert all(prompt.answer == (prompt.text,) and prompt.reference is None for prompt in by_kind["name"])


def test_a_suite_of_nothing_is_refused(shapes, edits):
    with pytest.raises(ValueError, match=r"data\.parts"):
        make(shapes, edits, parts={})
