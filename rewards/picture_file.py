"""Pictures as files."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def encode_picture(image_CHW: Tensor, format: str = "PNG", **options: int) -> bytes:
    """The file of a picture, uint8 [3, H, W]; `options` are Pillow's."""
    buffer = io.BytesIO()
    Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(buffer, format, **options)
    return buffer.getvalue()


def decode_picture(data: bytes) -> Tensor:
    """uint8 [3, H, W] of a file."""
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
