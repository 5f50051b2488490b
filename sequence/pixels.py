"""Pictures as the tokenizer takes them: upright RGB, cut and scaled to the pixels of their grids."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned upright as its EXIF tag says; what is transparent becomes white, 16 bits become 8.

    Raises ValueError for an image of floats.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow itself would cut values above 255 off
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("holds floats, whose range is not known; convert it to 8 or 16 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_image(image: Image.Image, pixels: tuple[int, int], box: Box | None = None) -> torch.Tensor:
    """Scales a part of an image to (height, width) with antialiasing.

    Args:
        image: RGB.
        pixels: (height, width) to come out.
        box: the part (left, top, right, bottom); the largest around the centre that has the ratio of `pixels` if not given.

    Returns:
        uint8 [3, height, width].
    """
    size = (pixels[1], pixels[0])
    if image.size != size or box is not None:
        image = image.resize(size, Image.Resampling.BICUBIC, box=box or crop_box(image, pixels))
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def crop_box(image: Image.Image, pixels: tuple[int, int], scale: float = 1.0, x: float = 0.5, y: float = 0.5) -> Box:
    """The part of an image that has the ratio of `pixels`.

    Args:
        image: the image.
        pixels: (height, width).
        scale: its sides as a fraction of the largest part.
        x, y: where it lies, from 0 (left, top) to 1.
    """
    largest = min(image.width / pixels[1], image.height / pixels[0]) * scale
    width, height = largest * pixels[1], largest * pixels[0]
    left, top = (image.width - width) * x, (image.height - height) * y
    # Rounding must not push the box over the edge: PIL refuses it.
    return max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height)
