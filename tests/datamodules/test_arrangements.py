"""How stored documents are trained on: order, loss, dropout."""

import random

import pytest
import torch

from nextflow.datamodules.arrangements import (
    AsStored,
    CaptionThenImage,
    ImageThenCaption,
    Part,
    SourceThenResult,
    TextOnly,
)
from nextflow.sequence.documents import ImageSegment, TextSegment

GRIDS = ((1, 1), (2, 2))


def text(*ids, loss=True):
    return Part(TextSegment(ids=list(ids), loss=loss))


def image(number, loss=True):
    return Part(ImageSegment(grids=GRIDS, codes=torch.full((5,), number), loss=loss))


def told(parts):
    """Each part as its ids or its code, in brackets where it is not trained on."""
    values = [list(p.segment.ids) if p.is_text else int(p.segment.codes[0]) for p in parts]
    return [value if p.segment.loss else (value,) for value, p in zip(values, parts)]


EDIT = [image(1), text(7, 8), image(2)]


def test_edits_learn_the_result_and_the_instruction_but_not_the_source():
    assert told(SourceThenResult()(EDIT, None)) == [(1,), [7, 8], 2]
    assert told(SourceThenResult(source_loss=True, text_loss=False)(EDIT, None)) == [1, ([7, 8],), 2]
    references = [text(5), image(1), image(3), text(6), image(2)]
    assert told(SourceThenResult()(references, None)) == [[5], (1,), (3,), [6], 2]


def test_a_dropped_instruction_leaves_source_and_result():
    arrange = SourceThenResult(instruction_dropout=0.5)
    found = [told(arrange(EDIT, random.Random(seed))) for seed in range(200)]
    assert {str(one) for one in found} == {"[(1,), [7, 8], 2]", "[(1,), 2]"}
    assert 70 < sum(len(one) == 2 for one in found) < 130
    assert len(arrange(EDIT, None)) == 3


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ([text(1), image(1)], "text, image"),
        ([image(1), text(1)], "image, text"),
        ([image(1), image(2)], "image, image"),
        ([image(1), image(2), image(3)], "image, image, image"),
        ([text(1), text(2), image(1)], "text, text, image"),
        ([], "nothing"),
    ],
)
def test_what_is_no_edit_is_refused_by_its_shape(parts, shape):
    with pytest.raises(ValueError, match=f"is no edit: it holds {shape}, not"):
        SourceThenResult()(parts, None)


def test_text_is_cut_to_a_window_over_segments():
    parts = [text(1, 2, 3), image(9), text(4, 5, 6)]
    assert told(TextOnly()(parts, None)) == [[1, 2, 3], [4, 5, 6]]
    assert told(TextOnly(max_ids=4)(parts, None)) == [[1, 2, 3], [4]]
    windows = {str(told(TextOnly(max_ids=4)(parts, random.Random(seed)))) for seed in range(40)}
    assert windows == {"[[1, 2, 3], [4]]", "[[2, 3], [4, 5]]", "[[3], [4, 5, 6]]"}
    assert told(TextOnly(max_ids=6)(parts, random.Random(0))) == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="has no text"):
        TextOnly()([image(1)], None)


def test_stories_keep_their_order_and_end_with_an_image_when_they_are_cut():
    story = [text(1), image(1), text(2), image(2), text(3), image(3), text(4)]
    assert told(AsStored()(story, None)) == told(story)
    assert told(AsStored(max_images=2)(story, None)) == [[1], 1, [2], 2]
    assert told(AsStored(max_images=3)(story, None)) == told(story)
    assert told(AsStored(text_loss=False)(story[:2], None)) == [([1],), 1]


def test_a_loss_that_is_off_in_the_record_stays_off():
    parts = [image(1, loss=False), text(7, loss=False), image(2, loss=False)]
    for arrange in (AsStored(), SourceThenResult(source_loss=True), CaptionThenImage(), ImageThenCaption()):
        assert not any(part.segment.loss for part in arrange(parts, None))


def test_captions_and_questions_learn_texts_alone():
    assert told(ImageThenCaption()([text(1), image(1)], None)) == [(1,), [1]]
    assert told(ImageThenCaption()([image(1), text(1, loss=False), text(2)], None)) == [(1,), ([1],), [2]]


@pytest.mark.parametrize(
    ("arrange", "parts", "message"),
    [
        (CaptionThenImage(), [text(1)], "has no image"),
        (CaptionThenImage(), [], "has no image"),
        (ImageThenCaption(), [text(1)], "has no image"),
        (ImageThenCaption(), [image(1)], "has no text"),
        (AsStored(), [], "is empty"),
    ],
)
def test_documents_of_another_type_are_refused(arrange, parts, message):
    with pytest.raises(ValueError, match=message):
        arrange(parts, None)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: CaptionThenImage(caption_dropout=1.5), "data.caption_dropout"),
        (lambda: CaptionThenImage(captioning_probability=-1), "data.captioning_probability"),
        (lambda: SourceThenResult(instruction_dropout=2), "data.instruction_dropout"),
        (lambda: AsStored(max_images=0), "data.max_images"),
    ],
)
def test_wrong_settings_name_their_key(make, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        make()
