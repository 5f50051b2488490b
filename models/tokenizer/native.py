"""Encoding and decoding of images of any size, and of mixed sizes (NextFlow section 2.1: "fully dynamic" in space).

An image's last grid is its own size over the stride (`ScaleSchedule.native_grids`); images of equal size go through the
tokenizer together.

N codes of an image over all scales, H x W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextflow.models.tokenizer.model import Tokenizer
from nextflow.sequence.correction import Correction
from nextflow.sequence.native import Fit, fit_to_stride
from nextflow.sequence.scales import Grid


@dataclass(frozen=True, kw_only=True)
class ImageCodes:
    """The codes of one image, and what it takes to decode them to its own size."""

    codes_N: Tensor
    """int64: the target codes, coarse to fine."""
    input_codes_N: Tensor | None
    """int64: the codes a generator is fed, where they were made with self-correction."""
    grids: tuple[Grid, ...]
    """Grids of all scales; the last times the stride is the size that was encoded."""
    size: tuple[int, int]
    """Height and width of the image in pixels, before it was padded or cut."""
    padding: tuple[int, int]
    """Rows below and columns on the right that were added; 0 where it was cut."""


def encode_images(
    tokenizer: Tokenizer,
    images: Sequence[Tensor],
    *,
    fit: Fit = "pad",
    max_batch: int = 16,
    correction: Correction | None = None,
) -> list[ImageCodes]:
    """Codes of images of any sizes, in the order of `images`.

    An image's codes do not depend on those beside it, up to the rounding of fp32 where two entries are equally near;
    with `correction`, its draws are a function of `correction.seed` and the image's number in the list.

    Args:
        tokenizer: in evaluation mode.
        images: each [3, H, W] in [-1, 1].
        fit: what happens to sides that are no multiple of the stride (`sequence.native`).
        max_batch: most images of one size that are encoded together.
        correction: self-correction, as in `Tokenizer.encode`.

    Raises ValueError for an image of another form.
    """
    schedule, device = tokenizer.schedule, tokenizer.quantizer.pixel_codebook.device
    fitted = []
    for number, image_CHW in enumerate(images):
        if image_CHW.ndim != 3 or image_CHW.shape[0] != 3 or not image_CHW.is_floating_point():
            raise ValueError(
                f"image {number} is {image_CHW.dtype} {tuple(image_CHW.shape)}, not float [3, H, W] in [-1, 1]"
            )
        fitted.append(fit_to_stride(image_CHW, schedule.stride, fit).to(device))
    found: dict[int, ImageCodes] = {}
    for numbers in _batches([tuple(image_CHW.shape) for image_CHW in fitted], max_batch):
        images_BCHW = torch.stack([fitted[number] for number in numbers])
        height, width = images_BCHW.shape[-2:]
        grids = schedule.native_grids(height, width)
        seed_B = None if correction is None else correction.seeds(numbers, device)
        encoding = tokenizer.encode(images_BCHW, grids, correction, seed_B)
        for row, number in enumerate(numbers):
            size = (images[number].shape[1], images[number].shape[2])
            found[number] = ImageCodes(
                codes_N=encoding.target_codes_BN[row],
                input_codes_N=None if correction is None else encoding.input_codes_BN[row],
                grids=grids,
                size=size,
                padding=(max(0, height - size[0]), max(0, width - size[1])),
            )
    return [found[number] for number in range(len(images))]


def decode_images(tokenizer: Tokenizer, codes: Sequence[ImageCodes], *, max_batch: int = 16) -> list[Tensor]:
    """Images [3, H, W] of codes, about [-1, 1], not clamped, in the order of `codes`.

    Padding is cut off again; what `fit="crop"` cut off does not come back.
    """
    device = tokenizer.quantizer.pixel_codebook.device
    found: dict[int, Tensor] = {}
    for numbers in _batches([item.grids for item in codes], max_batch):
        codes_BN = torch.stack([codes[number].codes_N for number in numbers]).to(device)
        images_BCHW = tokenizer.decode(codes_BN, codes[numbers[0]].grids)
        for number, image_CHW in zip(numbers, images_BCHW):
            height, width = codes[number].size
            found[number] = image_CHW[:, :height, :width]
    return [found[number] for number in range(len(codes))]


def _batches(keys: Sequence[Hashable], max_batch: int) -> Iterator[list[int]]:
    """Numbers of items that share a key, at most `max_batch` at a time."""
    if max_batch < 1:
        raise ValueError(f"max_batch must be positive, not {max_batch}")
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        groups[key].append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), max_batch):
            yield numbers[start : start + max_batch]
