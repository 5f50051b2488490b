"""Resizing maps of codebook vectors as a gather: (tap index, tap weight) per target cell.

A resize between two grids is linear, so it is a list of source cells and weights for each target cell. The list depends on
the two grids alone and is computed once; a batch of images of any mix of grids then resizes in one vectorised operation.
Pixel centres as in `torch.nn.functional.interpolate(..., align_corners=False)`, without antialiasing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from nextflow.sequence.scales import Grid

Interpolation = Literal["nearest", "bilinear", "bicubic"]


class Taps(NamedTuple):
    """Which source cells make each target cell. P target cells (row-major), T taps each."""

    index_PT: np.ndarray
    """int64, flat cell of the source grid."""
    weight_PT: np.ndarray
    """float32; the weights of one target cell sum to one."""


@lru_cache(maxsize=4096)
def taps(source: Grid, target: Grid, mode: Interpolation = "bilinear") -> Taps:
    """Taps that resize a map of grid `source` to grid `target`.

    Every pair of grids gives the same number of taps for one mode (1, 4 or 16), so that images can be mixed in a batch;
    taps that fall outside the map are moved to its border.
    """
    index_rows_HA, weight_rows_HA = _taps_of_axis(source[0], target[0], mode)
    index_columns_WB, weight_columns_WB = _taps_of_axis(source[1], target[1], mode)
    index_HWAB = index_rows_HA[:, None, :, None] * source[1] + index_columns_WB[None, :, None, :]
    weight_HWAB = weight_rows_HA[:, None, :, None] * weight_columns_WB[None, :, None, :]
    num_cells = target[0] * target[1]
    return Taps(index_HWAB.reshape(num_cells, -1), weight_HWAB.reshape(num_cells, -1).astype(np.float32))


def _taps_of_axis(source: int, target: int, mode: Interpolation) -> tuple[np.ndarray, np.ndarray]:
    if mode == "nearest":
        index_P = (np.arange(target) * source) // target
        return index_P[:, None], np.ones((target, 1))
    if mode not in ("bilinear", "bicubic"):
        raise ValueError(f"layout.interpolation must be nearest, bilinear or bicubic, got {mode!r}")
    centre_P = (np.arange(target) + 0.5) * source / target - 0.5
    if mode == "bilinear":
        centre_P = np.maximum(centre_P, 0.0)
        first_P = np.floor(centre_P).astype(np.int64)
        fraction_P = centre_P - first_P
        index_PT = np.stack([first_P, first_P + 1], axis=1)
        weight_PT = np.stack([1 - fraction_P, fraction_P], axis=1)
    else:
        first_P = np.floor(centre_P).astype(np.int64)
        fraction_P = centre_P - first_P
        index_PT = first_P[:, None] + np.arange(-1, 3)[None, :]
        distance_PT = np.abs(fraction_P[:, None] - np.arange(-1, 3)[None, :])
        weight_PT = _cubic(distance_PT)
    return np.clip(index_PT, 0, source - 1), weight_PT


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel with torch's coefficient."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * a * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
