"""Where the cells of an image stand in the sequence, what they weigh, and what they are made of.

Everything here depends on the image's grids alone, is computed once per list of grids, and serves training and generation.
Shapes: P positions of an image (`<boi>` and the cells of its blocks), T taps of a resize, S scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nextflow.sequence.resize import Interpolation, taps
from nextflow.sequence.scales import Grid, num_codes_of


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How documents become sequences."""

    rope_range: float = 16.0
    """Constant range factor C of the spatial positions (equation 1): they fill about [0, C] on any grid."""
    alpha: float = 0.0
    """Scale reweighting k_s = 1 / (h_s * w_s)^alpha (equation 2): 0 at the first level, 0.9 above."""
    interpolation: Interpolation = "bilinear"
    """How codes of scale k-1 are resized to grid k."""
    feed_last_scale: bool = False
    """Append the last scale's codes as one more block without targets (an ablation for source images)."""


class ImageLayout(NamedTuple):
    """Everything about an image's positions that depends on its grids alone: `<boi>` and its blocks, not `<eoi>`."""

    block_P: np.ndarray
    """int64, running position relative to `<boi>`."""
    spatial_2P: np.ndarray
    """float32, (h, w) positions of cells; 0 at `<boi>`, whose three axes are all its running position."""
    scale_P: np.ndarray
    """int64, scale that the position predicts: 1 at `<boi>`."""
    weight_P: np.ndarray
    """float32, weight of the position's target; they sum to the number of codes."""
    tap_index_PT: np.ndarray
    """int64, into the image's codes; row 0 (`<boi>`) is not an image input."""
    tap_weight_PT: np.ndarray
    """float32"""


@lru_cache(maxsize=2048)
def image_layout(grids: tuple[Grid, ...], config: LayoutConfig) -> ImageLayout:
    """Positions, weights and taps of an image with these grids; used by training and by generation."""
    num_taps = taps((1, 1), (1, 1), config.interpolation).index_PT.shape[1]
    block = [np.zeros(1, dtype=np.int64)]
    spatial = [np.zeros((2, 1), dtype=np.float32)]
    scale = [np.ones(1, dtype=np.int64)]
    weights = scale_weights(grids, config.alpha)
    weight = [weights[:1]]
    tap_index = [np.zeros((1, num_taps), dtype=np.int64)]
    tap_weight = [np.zeros((1, num_taps), dtype=np.float32)]
    sources = list(pairwise(grids))
    if config.feed_last_scale:
        sources.append((grids[-1], grids[-1]))
    for index, (source, target) in enumerate(sources, start=1):
        num_cells = target[0] * target[1]
        source_start = num_codes_of(grids[: index - 1])
        gather = taps(source, target, config.interpolation)
        block.append(np.full(num_cells, index, dtype=np.int64))
        spatial.append(spatial_positions(target, config.rope_range))
        scale.append(np.full(num_cells, index + 1, dtype=np.int64))
        weight.append(np.full(num_cells, weights[index] if index < len(grids) else 0.0, dtype=np.float32))
        tap_index.append(gather.index_PT + source_start)
        tap_weight.append(gather.weight_PT)
    return ImageLayout(
        block_P=np.concatenate(block),
        spatial_2P=np.concatenate(spatial, axis=1),
        scale_P=np.concatenate(scale),
        weight_P=np.concatenate(weight),
        tap_index_PT=np.concatenate(tap_index),
        tap_weight_PT=np.concatenate(tap_weight),
    )


def spatial_positions(grid: Grid, rope_range: float) -> np.ndarray:
    """Positions (h, w) of the cells of a grid, [2, H*W]: C / sqrt(H*W) * (i + 0.5, j + 0.5) (equation 1)."""
    height, width = grid
    step = rope_range / np.sqrt(height * width)
    rows = np.repeat((np.arange(height) + 0.5) * step, width)
    columns = np.tile((np.arange(width) + 0.5) * step, height)
    return np.stack([rows, columns]).astype(np.float32)


def scale_weights(grids: tuple[Grid, ...], alpha: float) -> np.ndarray:
    """Loss weight of a code of each scale, 1 / (h*w)^alpha, rescaled: the weights of all codes sum to their number."""
    cells = np.array([height * width for height, width in grids], dtype=np.float64)
    raw = cells**-alpha
    return (raw * cells.sum() / (raw * cells).sum()).astype(np.float32)
