"""x W^T for decoding, where few positions meet a large matrix.

The float32 product of a CPU (MKL) lays the whole matrix out anew before it multiplies. For few positions that costs as much as
the product itself, unless the copy stays in the cache: so the matrix comes in parts.

Shapes: any axes may stand in front; N positions, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PART_ELEMENTS = 2**19
"""Numbers of the matrix in a part of one thread: 2 MiB."""
MOST_POSITIONS = 192
"""Positions from which on the copy no longer matters."""


def linear(x_I: Tensor, weight_OI: Tensor) -> Tensor:
    """`torch.nn.functional.linear` without bias; with gradients, autocast or another device or dtype it is just that."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _gains_from_parts(x_I, weight_OI):
        return F.linear(x_I, weight_OI)
    x_NI = x_I.reshape(-1, weight_OI.shape[1])
    y_NO = x_NI.new_empty(len(x_NI), weight_OI.shape[0])
    rows = _rows(weight_OI)
    for weight_oI, y_No in zip(weight_OI.split(rows), y_NO.split(rows, dim=1)):
        torch.mm(x_NI, weight_oI.T, out=y_No)
    return y_NO.view(*x_I.shape[:-1], -1)


def linear_ref(x_I: Tensor, weight_OI: Tensor) -> Tensor:
    """The definition."""
    return F.linear(x_I, weight_OI)


def _gains_from_parts(x_I: Tensor, weight_OI: Tensor) -> bool:
    return (
        weight_OI.device.type == "cpu"
        and x_I.dtype == weight_OI.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and 1 < x_I.numel() // weight_OI.shape[1] < MOST_POSITIONS
        and weight_OI.shape[0] >= 2 * _rows(weight_OI)
    )


def _rows(weight_OI: Tensor) -> int:
    """Rows of a part: its threads share them."""
    return max(1, PART_ELEMENTS * torch.get_num_threads() // weight_OI.shape[1])
