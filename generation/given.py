"""Codes of a picture that generation keeps (`GenerationRequest.given`): coarse scales, or everything outside a mask.

Shapes: N codes of a picture over all scales, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.sequence.layout import UNKNOWN_CODE
from nextflow.sequence.scales import Grid, num_codes_of


def keep_scales(codes_N: Tensor, grids: tuple[Grid, ...], num_scales: int) -> Tensor:
    """Keep the first `num_scales` scales and draw the others: the layout stays, the details vary.

    Args:
        codes_N: codes of the picture, or of its first scales.
        grids: grids of all scales.
        num_scales: from 0 (draw everything) to one less than there are.

    Returns:
        int64 [N], for `GenerationRequest.given`.

    Raises ValueError when there are not so many scales.
    """
    if not 0 <= num_scales < len(grids):
        raise ValueError(f"{num_scales} scales cannot be kept: the picture has {len(grids)}, and one must be drawn")
    kept = num_codes_of(grids[:num_scales])
    if len(codes_N) < kept:
        raise ValueError(f"{num_scales} scales hold {kept} codes, got {len(codes_N)}")
    given_N = torch.full((num_codes_of(grids),), UNKNOWN_CODE, dtype=torch.int64)
    given_N[:kept] = codes_N[:kept].cpu()
    return given_N


def keep_outside(codes_N: Tensor, grids: tuple[Grid, ...], mask_HW: Tensor, threshold: float = 0.5) -> Tensor:
    """Keep what lies outside a mask and draw what lies inside, at every scale: inpainting.

    Args:
        codes_N: codes of the picture.
        grids: grids of all scales.
        mask_HW: True where the picture is drawn anew; any size.
        threshold: see `code_mask`.

    Returns:
        int64 [N], for `GenerationRequest.given`.

    Raises ValueError when the mask is empty, or too small to fill a cell of any scale.
    """
    inside_N = code_mask(mask_HW, grids, threshold)
    if not bool(inside_N.any()):
        raise ValueError(
            f"the mask fills no cell of the last grid {grids[-1]} to more than {threshold:g}: make it larger, "
            "or lower the threshold"
        )
    return codes_N.cpu().masked_fill(inside_N, UNKNOWN_CODE)


def code_mask(mask_HW: Tensor, grids: tuple[Grid, ...], threshold: float = 0.5) -> Tensor:
    """A mask of pixels on the grids of all scales.

    Args:
        mask_HW: bool, or the share of each pixel in [0, 1].
        grids: grids of all scales.
        threshold: a cell belongs to the mask when more than this share of its area does. With 0.5 coarse scales, whose cells
            reach far beyond a small mask, stay as they are, and so does the rest of the picture; 0 takes every cell touched.

    Returns:
        bool [N], True inside.
    """
    mask_11HW = mask_HW.detach().cpu().float()[None, None]
    shares = [F.adaptive_avg_pool2d(mask_11HW, grid).flatten() for grid in grids]
    return torch.cat(shares) > threshold
