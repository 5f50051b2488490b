"""Where the cells of an image stand in the sequence, what they weigh, and what they are made of.

Everything here depends on the image's grids alone, is computed once per list of grids, and serves training and generation.
Shapes: P positions of an image (`<boi>` and the cells of its blocks), T taps of a resize, S scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from nextflow.sequence.resize import Interpolation, Taps, taps
from nextflow.sequence.scales import Grid, num_codes_of

Positions = Literal["normalized", "grid", "shifted_grid"]
Features = Literal["residual", "accumulated"]


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How documents become sequences. The defaults are the paper's; the other values are its ablations."""

    positions: Positions = "normalized"
    """Spatial positions of cell (i, j). normalized: C / sqrt(H*W) * (i + 0.5, j + 0.5), the same range on every grid
    (equation 1). grid: (i, j). shifted_grid: (p + i, p + j), p the scale's running position, as Qwen2.5-VL places patches."""
    rope_range: float = 16.0
    """Constant range factor C of normalized positions (equation 1): they fill about [0, C] on any grid."""
    features: Features = "residual"
    """What block k is made of. residual: the code vectors of scale k-1 alone, resized to grid k. accumulated: the sum of
    those of all coarser scales, each resized to grid k, as VAR feeds what it has drawn so far."""
    alpha: float = 0.0
    """Scale reweighting k_s = 1 / (h_s * w_s)^alpha (equation 2): 0 at the first level, 0.9 above."""
    interpolation: Interpolation = "bilinear"
    """How codes of a coarser scale are resized to grid k."""
    feed_last_scale: bool = False
    """Append one more block without targets, made of the last scale's codes too (an ablation for source images)."""

    def __post_init__(self) -> None:
        for name, known in (("positions", get_args(Positions)), ("features", get_args(Features))):
            if getattr(self, name) not in known:
                raise ValueError(f"layout.{name} must be {', '.join(known)}, got {getattr(self, name)!r}")

    def num_taps(self, num_scales: int) -> int:
        """Taps of each cell of an image with so many scales; a cell that needs fewer has taps of weight 0."""
        sources = max(1, num_scales - 1 + self.feed_last_scale) if self.features == "accumulated" else 1
        return sources * taps((1, 1), (1, 1), self.interpolation).index_PT.shape[1]


class ImageLayout(NamedTuple):
    """Everything about an image's positions that depends on its grids alone: `<boi>` and its blocks, not `<eoi>`."""

    block_P: np.ndarray
    """int64, running position relative to `<boi>`."""
    spatial_2P: np.ndarray
    """float32, (h, w) positions; those that `moves_P` names are relative to `<boi>`."""
    moves_P: np.ndarray
    """bool, whether (h, w) move with the running position: `<boi>`, whose three axes are all that, and shifted cells."""
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
    num_taps = config.num_taps(len(grids))
    weights = scale_weights(grids, config.alpha)
    blocks = [*grids[1:], grids[-1]] if config.feed_last_scale else grids[1:]
    num_cells = [1, *(height * width for height, width in blocks)]
    inputs = [_block_taps(grids[:index], target, config, num_taps) for index, target in enumerate(blocks, start=1)]
    boi = Taps(np.zeros((1, num_taps), dtype=np.int64), np.zeros((1, num_taps), dtype=np.float32))
    shifted = config.positions == "shifted_grid"
    spatial = [np.zeros((2, 1), dtype=np.float32)]
    spatial += [spatial_positions(grid, config) + shifted * block for block, grid in enumerate(blocks, start=1)]
    index = np.arange(len(num_cells))
    return ImageLayout(
        block_P=np.repeat(index, num_cells),
        spatial_2P=np.concatenate(spatial, axis=1),
        moves_P=np.repeat((index == 0) | shifted, num_cells),
        scale_P=np.repeat(index + 1, num_cells),
        weight_P=np.repeat([*weights, 0.0][: len(num_cells)], num_cells).astype(np.float32),
        tap_index_PT=np.concatenate([boi.index_PT, *(one.index_PT for one in inputs)]),
        tap_weight_PT=np.concatenate([boi.weight_PT, *(one.weight_PT for one in inputs)]),
    )


def _block_taps(coarser: tuple[Grid, ...], target: Grid, config: LayoutConfig, num_taps: int) -> Taps:
    """Taps into an image's codes that make a block of grid `target` of the scales before it, padded to `num_taps`."""
    first = 0 if config.features == "accumulated" else len(coarser) - 1
    index, weight = [], []
    for scale in range(first, len(coarser)):
        one = taps(coarser[scale], target, config.interpolation)
        index.append(one.index_PT + num_codes_of(coarser[:scale]))
        weight.append(one.weight_PT)
    padding = ((0, 0), (0, num_taps - sum(part.shape[1] for part in index)))
    return Taps(np.pad(np.concatenate(index, axis=1), padding), np.pad(np.concatenate(weight, axis=1), padding))


def spatial_positions(grid: Grid, config: LayoutConfig) -> np.ndarray:
    """Positions (h, w) of the cells of a grid, [2, H*W], as `layout.positions` says; shifted ones without their shift."""
    height, width = grid
    cell_2P = np.stack([np.repeat(np.arange(height), width), np.tile(np.arange(width), height)])
    if config.positions == "normalized":
        step = config.rope_range / np.sqrt(height * width)
        return ((cell_2P + 0.5) * step).astype(np.float32)
    return cell_2P.astype(np.float32)


def scale_weights(grids: tuple[Grid, ...], alpha: float) -> np.ndarray:
    """Loss weight of a code of each scale, 1 / (h*w)^alpha, rescaled: the weights of all codes sum to their number."""
    cells = np.array([height * width for height, width in grids], dtype=np.float64)
    raw = cells**-alpha
    return (raw * cells.sum() / (raw * cells).sum()).astype(np.float32)
