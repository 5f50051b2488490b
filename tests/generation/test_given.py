"""What is kept of a picture: whole coarse scales, or the cells outside a mask."""

from __future__ import annotations

import pytest
import torch

from nextflow.generation.given import code_mask, keep_outside, keep_scales

GRIDS = ((1, 1), (2, 2), (4, 4))
CODES_N = torch.arange(21)


def test_scales_are_kept_from_the_coarse_end():
    given_N = keep_scales(CODES_N, GRIDS, 2)
    assert given_N.tolist() == [0, 1, 2, 3, 4] + [-1] * 16
    assert torch.equal(keep_scales(CODES_N[:5], GRIDS, 2), given_N), "codes of finer scales are not needed"
    assert keep_scales(CODES_N, GRIDS, 0).tolist() == [-1] * 21


def test_a_cell_belongs_to_the_mask_by_its_share():
    mask_HW = torch.zeros(8, 8, dtype=torch.bool)
    mask_HW[:4, :4] = True  # a quarter: one cell of 2 x 2, four of 4 x 4, a quarter of 1 x 1
    inside_N = code_mask(mask_HW, GRIDS)
    assert inside_N[:5].tolist() == [False, True, False, False, False]
    expected_HW = torch.zeros(4, 4, dtype=torch.bool)
    expected_HW[:2, :2] = True
    assert torch.equal(inside_N[5:].view(4, 4), expected_HW)
    assert code_mask(mask_HW, GRIDS, threshold=0.0)[:5].tolist() == [True, True, False, False, False]
    given_N = keep_outside(CODES_N, GRIDS, mask_HW)
    assert torch.equal(given_N == -1, inside_N) and torch.equal(given_N[~inside_N], CODES_N[~inside_N])


def test_masks_of_any_size_and_ratio():
    mask_HW = torch.zeros(30, 100)
    mask_HW[:, 50:] = 1.0
    inside_N = code_mask(mask_HW, ((1, 1), (2, 6)))
    assert inside_N.tolist() == [False] + [False, False, False, True, True, True] * 2


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="the picture has 3, and one must be drawn"):
        keep_scales(CODES_N, GRIDS, 3)
    with pytest.raises(ValueError, match="2 scales hold 5 codes, got 4"):
        keep_scales(CODES_N[:4], GRIDS, 2)
    with pytest.raises(ValueError, match="make it larger"):
        keep_outside(CODES_N, GRIDS, torch.zeros(8, 8, dtype=torch.bool))
