"""Edit rewards: the known result scores 1 on both, the source changes nothing, another picture keeps nothing."""

import torch

from nextflow.rewards.edit import EditChangedReward, EditKeptReward

SOURCE = torch.full((3, 8, 8), 200, dtype=torch.uint8)
RESULT = SOURCE.clone()
RESULT[:, :4] = 50
KNOWN = {"sources": [SOURCE], "reference": RESULT}


def scores(image, known=KNOWN):
    return tuple(float(reward([image], [""], [known])) for reward in (EditChangedReward(), EditKeptReward()))


def test_result_source_and_neither():
    assert scores(RESULT) == (1.0, 1.0)
    assert scores(SOURCE) == (0.0, 1.0)
    changed, kept = scores(torch.zeros_like(SOURCE))
    assert abs(changed - (1 - 50 / 150)) < 1e-6 and kept == 0
    changed, kept = scores(255 - SOURCE)
    assert changed > 0.9 and kept < 0.5  # 55: near 50, but so is the rest


def test_the_rest_is_measured_where_nothing_should_change():
    image = RESULT.clone()
    image[:, 6:] = 180
    changed, kept = scores(image)
    assert changed == 1.0 and abs(kept - (1 - 0.5 * (20 / 255) / 0.25)) < 1e-5


def test_the_edit_is_the_mask():
    (mask,) = EditChangedReward().masks([SOURCE], [""], [KNOWN])
    assert mask[:4].all() and not mask[4:].any()


def test_sources_of_another_size_and_prompts_without_edit():
    large = {"sources": [SOURCE.repeat(1, 2, 2)], "reference": RESULT}
    assert scores(RESULT, large) == (1.0, 1.0)
    for known in ({}, {"sources": [], "reference": RESULT}, {"sources": [SOURCE], "reference": None}):
        assert all(torch.tensor(scores(RESULT, known)).isnan())
    same = {"sources": [SOURCE], "reference": SOURCE}  # nothing to change
    assert torch.tensor(scores(SOURCE, same)).isnan().tolist() == [True, False]


def test_examples_in_context_are_not_what_is_edited():
    """Example, its result, then the picture to edit: the first is told apart from the last."""
    example = torch.zeros_like(SOURCE)
    known = {"sources": [example, 255 - example, SOURCE], "reference": RESULT}
    assert [
        float(reward([SOURCE], [""], [known])) for reward in (EditChangedReward(source=-1), EditKeptReward(source=-1))
    ] == [0, 1]
    assert float(EditKeptReward()([SOURCE], [""], [known])) != 1
    (mask,) = EditChangedReward(source=-1).masks([SOURCE], [""], [known])
    assert mask[:4].all() and not mask[4:].any()
