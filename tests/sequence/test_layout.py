"""The grammar, checked against sequences written by hand, and its invariants."""

import pytest
import torch
from torch.nn import functional as F

from nextflow.sequence.documents import Document, ImageSegment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig, scale_weights
from nextflow.sequence.layout import IGNORE, PADDING, lay_out
from nextflow.sequence.packing import document_length, pack_fixed_length, pack_padded
from nextflow.sequence.scales import ScaleSchedule, num_codes_of

VOCABULARY = Vocabulary(text_size=100, codebook_size=50, start_id=0, end_id=1)
BOI, EOI, CODE = 100, 101, 102
SCHEDULE = ScaleSchedule(sides=(1, 2, 3), levels={24: 3}, stride=8)
GRIDS = SCHEDULE.grids(24)  # 1x1, 2x2, 3x3


def _image(first: int = 0, **options) -> ImageSegment:
    return ImageSegment(grids=GRIDS, codes=torch.arange(first, first + 14), **options)


def test_caption_and_picture_by_hand() -> None:
    document = Document(segments=(TextSegment(ids=[7, 8]), _image()))
    rows = lay_out([[document]], VOCABULARY, LayoutConfig(rope_range=6.0))
    # <start> 7 8 <boi> [2x2 block] [3x3 block] <eoi>
    assert rows.ids_BL[0].tolist() == [0, 7, 8, BOI] + [0] * 13 + [EOI]
    assert rows.block_BL[0].tolist() == [0, 1, 2, 3] + [4] * 4 + [5] * 9 + [6]
    assert rows.scale_BL[0].tolist() == [0, 0, 0, 1] + [2] * 4 + [3] * 9 + [0]
    assert rows.num_scales_BL[0].tolist() == [0, 0, 0] + [3] * 14 + [0]
    # Each position's target is what follows; <boi> predicts code 0, the blocks the rest, <eoi> the end.
    assert rows.target_BL[0].tolist() == [7, 8, BOI, *range(CODE, CODE + 14), 1]
    assert rows.code_position_N.tolist() == list(range(3, 17))
    assert rows.input_position_M.tolist() == list(range(4, 17))
    # Figure 5 and equation 1: <boi> (p, p, p); cells (p, C/sqrt(HW) * (i + 0.5), C/sqrt(HW) * (j + 0.5)).
    t, h, w = rows.position_3BL[:, 0].tolist()
    assert t == [0, 1, 2, 3] + [4] * 4 + [5] * 9 + [6]
    assert h[:4] == w[:4] == [0, 1, 2, 3]
    assert h[4:8] == [1.5, 1.5, 4.5, 4.5]
    assert w[4:8] == [1.5, 4.5, 1.5, 4.5]
    assert h[8:17] == [1, 1, 1, 3, 3, 3, 5, 5, 5]
    assert h[17] == w[17] == 6


def test_image_inputs_are_the_previous_scales_codes_alone() -> None:
    rows = lay_out([[Document(segments=(_image(),))]], VOCABULARY, LayoutConfig())
    used = [set(index.tolist()) for index in rows.tap_index_MT]
    assert all(index == {0} for index in used[:4])  # the 2x2 block is made of the 1x1 code
    assert set.union(*used[4:]) == {1, 2, 3, 4}  # the 3x3 block of the 2x2 codes, not of the 1x1 code


def test_accumulated_inputs_are_the_sum_of_all_coarser_scales_resized() -> None:
    """Against torch's own resizing of maps of vectors, for images of other numbers of scales in one batch."""
    wide = ((1, 1), (1, 2), (2, 4), (3, 6))
    images = [(GRIDS, torch.arange(14)), (wide, torch.arange(29).flip(0))]
    vectors_KC = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    documents = [[Document(segments=(ImageSegment(grids=grids, codes=codes),))] for grids, codes in images]
    for feed_last_scale in (False, True):
        config = LayoutConfig(features="accumulated", feed_last_scale=feed_last_scale)
        rows = lay_out(documents, VOCABULARY, config)
        fed_MC = (vectors_KC[rows.input_code_N[rows.tap_index_MT]] * rows.tap_weight_MT[..., None]).sum(1)
        expected = []
        for grids, codes in images:
            maps = [
                v.T.unflatten(-1, grid) for v, grid in zip(vectors_KC[codes].split([h * w for h, w in grids]), grids)
            ]
            for block, target in enumerate([*grids[1:], *grids[-1:] * feed_last_scale], start=1):
                resized = [F.interpolate(one[None], size=target, mode="bilinear")[0] for one in maps[:block]]
                expected.append(torch.stack(resized).sum(0).flatten(1).T)
        torch.testing.assert_close(fed_MC, torch.cat(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["grid", "shifted_grid"])
def test_positions_of_the_ablation(positions: str) -> None:
    document = Document(segments=(TextSegment(ids=[7, 8]), _image()))
    rows = lay_out([[document]], VOCABULARY, LayoutConfig(positions=positions))
    t, h, w = rows.position_3BL[:, 0].tolist()
    assert t == [0, 1, 2, 3] + [4] * 4 + [5] * 9 + [6]
    assert h[:4] == w[:4] == [0, 1, 2, 3] and h[17] == w[17] == 6  # text, <boi> and <eoi> as ever
    shift2, shift3 = (4, 5) if positions == "shifted_grid" else (0, 0)
    assert h[4:8] == [shift2 + i for i in (0, 0, 1, 1)] and w[4:8] == [shift2 + j for j in (0, 1, 0, 1)]
    assert h[8:17] == [shift3 + i for i in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    with pytest.raises(ValueError, match=r"layout\.positions must be normalized, grid, shifted_grid"):
        LayoutConfig(positions="centred")


def test_visibility_by_brute_force() -> None:
    documents = [
        Document(segments=(TextSegment(ids=[5]), _image(), TextSegment(ids=[6, 7]), _image(20))),
        Document(segments=(_image(), TextSegment(ids=[9]))),
    ]
    rows = lay_out([documents], VOCABULARY, LayoutConfig(), length=64)
    visible_LL = rows.visible_BLL()[0]
    document, block = rows.document_BL[0].tolist(), rows.block_BL[0].tolist()
    for query in range(64):
        for key in range(64):
            assert visible_LL[query, key] == (document[query] == document[key] and block[key] <= block[query])
    # In words: text is causal, a scale sees itself whole, coarser scales and text before it, nothing of another document.
    real = document.index(1)
    assert not visible_LL[:real, real:].any()
    assert not visible_LL[real:, :real].any()
    assert visible_LL[3:7, 3:7].all()  # the 2x2 block of the first image


def test_two_documents_and_padding() -> None:
    document = Document(segments=(_image(), TextSegment(ids=[5])))
    rows = lay_out([[document, document], [document]], VOCABULARY, LayoutConfig())
    length = document_length(document)
    assert rows.ids_BL.shape == (2, 2 * length)
    assert rows.document_BL[0].tolist() == [0] * length + [1] * length
    assert rows.document_BL[1].tolist() == [0] * length + [PADDING] * length
    assert rows.target_BL[1, length:].eq(IGNORE).all()
    torch.testing.assert_close(rows.position_3BL[:, 0, length:], rows.position_3BL[:, 0, :length])
    assert rows.code_N.tolist() == list(range(14)) * 3
    # Flat indices of the second document point at its own codes and positions.
    assert rows.tap_index_MT[13:26].min() >= 14
    assert rows.code_position_N[14:28].tolist() == [length + 1 + n for n in range(14)]


def test_loss_false_ignores_a_segments_own_targets_alone() -> None:
    document = Document(segments=(_image(loss=False), TextSegment(ids=[5, 6])))
    rows = lay_out([[document]], VOCABULARY, LayoutConfig())
    # <start> would predict <boi> and the image its codes: ignored. <eoi> predicts 5, 5 predicts 6, 6 the end.
    assert rows.target_BL[0].tolist() == [IGNORE] * 15 + [5, 6, 1]
    assert rows.weight_BL[0].tolist() == [0.0] * 15 + [1.0] * 3


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.2])
def test_reweighting_keeps_the_total(alpha: float) -> None:
    schedule = ScaleSchedule.nextflow()
    for ratio in (1.0, 0.5):
        grids = schedule.grids(512, ratio)
        weights = scale_weights(grids, alpha)
        cells = [height * width for height, width in grids]
        total = sum(weight * count for weight, count in zip(weights, cells))
        assert total == pytest.approx(num_codes_of(grids), rel=1e-5)
        expected_ratio = (cells[-1] / cells[3]) ** alpha
        assert weights[3] / weights[-1] == pytest.approx(expected_ratio, rel=1e-4)


def test_codes_on_the_fly_equal_codes_from_shards() -> None:
    codes = torch.arange(14).flip(0)
    segments = [
        (TextSegment(ids=[5]), ImageSegment(grids=GRIDS, codes=known))
        for known in (codes, None)
    ]  # fmt: skip
    known, unknown = (lay_out([[Document(segments=s)] * 2], VOCABULARY, LayoutConfig(alpha=0.9)) for s in segments)
    filled = unknown.with_codes(torch.cat([codes, codes]), VOCABULARY.code_offset)
    for name in known.__dataclass_fields__:
        torch.testing.assert_close(getattr(filled, name), getattr(known, name))
    with pytest.raises(ValueError, match="28 codes, got 14"):
        unknown.with_codes(codes, VOCABULARY.code_offset)


def test_self_corrected_inputs_leave_targets_alone() -> None:
    fed = torch.full((14,), 33)
    rows = lay_out([[Document(segments=(_image(),))]], VOCABULARY, LayoutConfig())
    rows = rows.with_codes(rows.code_N, VOCABULARY.code_offset, fed)
    assert rows.code_N.tolist() == list(range(14))
    assert rows.input_code_N.tolist() == [33] * 14
    assert rows.target_BL[0, 1:15].tolist() == list(range(CODE, CODE + 14))


def test_feed_last_scale_appends_a_block_without_targets() -> None:
    config = LayoutConfig(feed_last_scale=True)
    document = Document(segments=(_image(loss=False), TextSegment(ids=[5])))
    rows = lay_out([[document]], VOCABULARY, config)
    assert rows.ids_BL.shape[1] == document_length(document, feed_last_scale=True)
    assert rows.block_BL[0].tolist() == [0, 1] + [2] * 4 + [3] * 9 + [4] * 9 + [5, 6]
    last_MT = rows.tap_index_MT[-9:]
    weights_MT = rows.tap_weight_MT[-9:]
    fed = torch.where(weights_MT > 0, last_MT, -1).amax(-1)
    assert fed.tolist() == list(range(5, 14))  # its own codes, unresized


def test_wrong_number_of_codes_is_named() -> None:
    document = Document(segments=(ImageSegment(grids=GRIDS, codes=torch.arange(13)),))
    with pytest.raises(ValueError, match="its grids hold 14 codes"):
        lay_out([[document]], VOCABULARY, LayoutConfig())


def test_document_too_long_for_the_row_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"data\.max_length"):
        lay_out([[Document(segments=(_image(),))]], VOCABULARY, LayoutConfig(), length=10)


def test_packing_strategies() -> None:
    assert pack_padded([5, 3]) == [[0], [1]]
    lengths = [5, 3, 4, 1, 8, 2]
    rows = pack_fixed_length(lengths, 8)
    assert sorted(index for row in rows for index in row) == list(range(6))
    assert all(sum(lengths[index] for index in row) <= 8 for row in rows)
    assert rows == [[0, 1], [2, 3, 5], [4]]
    with pytest.raises(ValueError, match="9 positions"):
        pack_fixed_length([9], 8)
