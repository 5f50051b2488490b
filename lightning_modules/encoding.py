"""Codes of images that come as pixels, made by the frozen tokenizer while the transformer trains or answers.

In float32 whatever the precision, so that codes made on the fly are those of token shards.
Shapes: B images of equal grids, N codes of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextflow.lightning_modules.tokenizer import to_signed
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.sequence.scales import Grid


@torch.no_grad()
def encode_pixels(
    tokenizer: Tokenizer, images: Sequence[Tensor], grids: Sequence[tuple[Grid, ...]], device: torch.device
) -> list[Tensor]:
    """Codes int64 [N] of uint8 images [3, H, W] of any mix of sizes, in their order; equal grids are encoded together.

    The tokenizer is no submodule of who owns it, so Lightning does not move it: this does.
    """
    if next(tokenizer.parameters()).device != device:
        tokenizer.to(device)
    groups: dict[tuple[Grid, ...], list[int]] = {}
    for index, of_image in enumerate(grids):
        groups.setdefault(of_image, []).append(index)
    codes: dict[int, Tensor] = {}
    with torch.autocast(device.type, enabled=False):
        for of_image, indices in groups.items():
            images_BCHW = torch.stack([images[index] for index in indices]).to(device)
            codes.update(zip(indices, tokenizer.encode(to_signed(images_BCHW), of_image).target_codes_BN))
    return [codes[index] for index in range(len(images))]
