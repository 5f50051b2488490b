"""Area and bicubic resizing of small maps as matrix products: y = A_height x A_width^T.

Both modes of `torch.nn.functional.interpolate` are linear and separable, so one cached matrix per axis replaces the
call. In a loop over scales this is several times faster on small grids, and its backward pass is a matrix product as
well.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nextflow.sequence.scales import Grid

Mode = Literal["area", "bicubic"]


def resample(x_BCHW: Tensor, grid: Grid, mode: Mode) -> Tensor:
    """`F.interpolate(x_BCHW, grid, mode=mode)` (half-pixel centres), in the data type of `x_BCHW`."""
    height, width = x_BCHW.shape[-2:]
    if width != grid[1]:
        x_BCHW = x_BCHW @ _matrix(width, grid[1], mode, x_BCHW.dtype, x_BCHW.device).T
    if height != grid[0]:
        x_BCHW = _matrix(height, grid[0], mode, x_BCHW.dtype, x_BCHW.device) @ x_BCHW
    return x_BCHW


@lru_cache(maxsize=4096)
def _matrix(source: int, target: int, mode: Mode, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[target, source] weights of one axis, read off by resizing the identity. A plain tensor also under inference mode."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # area averages along its axis alone; bicubic interpolates a row of equal columns exactly, whatever the other axis
        eye_11SS = torch.eye(source)[None, None]
        matrix_11TS = F.interpolate(eye_11SS, size=(target, source), mode=mode)
        return matrix_11TS[0, 0].to(device=device, dtype=dtype)
