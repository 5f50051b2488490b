"""Images of any size at a tokenizer's stride: sides that are no multiple of it are padded or cut.

Padding repeats the last row below and the last column on the right, so that the picture's upper left corner stays where it is
and cutting the result back needs its size alone. Cutting keeps the centre.

C channels, H x W pixels.
"""

from typing import Literal

import torch
from torch import Tensor

Fit = Literal["pad", "crop"]


def fit_to_stride(image_CHW: Tensor, stride: int, fit: Fit = "pad") -> Tensor:
    """An image whose sides are multiples of `stride`: the next ones (`pad`) or the last ones (`crop`).

    Args:
        image_CHW: any data type, [C, H, W].
        stride: pixels per cell.
        fit: `pad` or `crop`.

    Raises ValueError when an image is empty, or smaller than one cell and to be cut.
    """
    height, width = image_CHW.shape[-2:]
    if fit == "pad":
        if min(height, width) < 1:
            raise ValueError(f"an image of {height} x {width} pixels is empty")
        rows_H = torch.arange(height + -height % stride, device=image_CHW.device).clamp(max=height - 1)
        columns_W = torch.arange(width + -width % stride, device=image_CHW.device).clamp(max=width - 1)
        return image_CHW[:, rows_H][:, :, columns_W]
    if min(height, width) < stride:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than one cell of {stride}: pad it instead")
    new_height, new_width = height - height % stride, width - width % stride
    top, left = (height - new_height) // 2, (width - new_width) // 2
    return image_CHW[:, top : top + new_height, left : left + new_width]
