"""Distances between images and their reconstructions, one value per image, and the ranges in which they are compared.

B images, H W pixels.
"""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SSIM_SIDE = 11
"""The window's: a smaller image has no SSIM."""
LPIPS_SIDE = 16
"""VGG16 halves an image four times."""
_SMALLEST_ERROR = 1e-10


def psnr(decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """-10 log10(mean squared error) of images in [0, 1], in dB, [B].

    An error counts as at least 1e-10: one perfect image among many (a white page) is 100 dB and no infinite mean.
    """
    error_B = (decoded_BCHW - images_BCHW).square().mean(dim=(1, 2, 3))
    return -10 * error_B.clamp_min(_SMALLEST_ERROR).log10()


def ssim(decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Structural similarity of images in [0, 1] under a Gaussian window of 11 pixels, sigma 1.5, [B]."""
    values_B = structural_similarity_index_measure(decoded_BCHW, images_BCHW, data_range=1.0, reduction="none")
    assert isinstance(values_B, Tensor)  # a tuple only where the whole map is asked for
    return values_B.view(-1)


def to_unit(images_BCHW: Tensor) -> Tensor:
    """About [-1, 1] to [0, 1], clamped, in float32."""
    return images_BCHW.float().clamp(-1, 1) * 0.5 + 0.5


def to_bytes(unit_BCHW: Tensor) -> Tensor:
    """[0, 1] to uint8, rounded."""
    return (unit_BCHW * 255).round().byte()
