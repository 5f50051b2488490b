"""Doubles a trained pixel decoder without changing what it computes (third training stage of NextFlow section 3.1).

The paper doubles the decoder's capacity and fine-tunes it; how the doubled weights start is not stated. Here (Net2Net):
every channel becomes two equal ones, whose outgoing weights share the old weight unevenly, so that the two learn
different things from the first step; every added residual block starts as the identity. The grown decoder's output
equals the trained one's up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from nextflow.models.tokenizer.pixel import AttentionBlock, PixelDecoder, ResidualBlock, ShuffleUp


@torch.no_grad()
def grow_decoder(source: PixelDecoder, target: PixelDecoder, seed: int = 0) -> None:
    """Fill `target`, built with twice the capacity of `source`, so that both compute the same function."""
    generator = torch.Generator().manual_seed(seed)
    _grow_conv(source.from_code, target.from_code, generator, grow_in=False)
    _grow_conv(source.from_latent, target.from_latent, generator)
    _grow_chain(source.middle, target.middle, generator)
    old: Any
    new: Any
    for old, new in zip(source.stages, target.stages):
        _grow_chain(old.blocks, new.blocks, generator)
        if not isinstance(old.up, nn.Identity):
            _grow_conv(old.up.conv, new.up.conv, generator, block=4 if isinstance(old.up, ShuffleUp) else 1)
    _grow_norm(source.norm, target.norm)
    _grow_conv(source.to_pixels, target.to_pixels, generator, grow_out=False)


def _grow_chain(source: Iterable[Any], target: Iterable[Any], generator: torch.Generator) -> None:
    for old, new in zip_longest(source, target):
        if old is None:  # an added residual block: its branch adds nothing at first
            nn.init.zeros_(new.conv2.weight)
            nn.init.zeros_(new.conv2.bias)
        elif isinstance(new, ResidualBlock):
            _grow_norm(old.norm1, new.norm1)
            _grow_conv(old.conv1, new.conv1, generator)
            _grow_norm(old.norm2, new.norm2)
            _grow_conv(old.conv2, new.conv2, generator)
        elif isinstance(new, AttentionBlock):
            _grow_norm(old.norm, new.norm)
            for name in ("query", "key", "value", "out"):
                _grow_conv(getattr(old, name), getattr(new, name), generator)
            # twice the channels double q.k, and attention divides by sqrt(2) more: sqrt(2) too much is left
            for parameter in new.query.parameters():
                parameter.mul_(0.5**0.5)


def _grow_norm(source: nn.GroupNorm, target: nn.GroupNorm) -> None:
    # equal neighbours fall into the same group, whose mean and variance therefore stay
    target.weight.copy_(source.weight.repeat_interleave(2))
    target.bias.copy_(source.bias.repeat_interleave(2))


def _grow_conv(
    source: nn.Conv2d,
    target: nn.Conv2d,
    generator: torch.Generator,
    *,
    grow_in: bool = True,
    grow_out: bool = True,
    block: int = 1,
) -> None:
    """`block` output channels belong together (the four of a pixel-shuffle) and are doubled as one."""
    assert source.bias is not None and target.bias is not None
    weight_OIhw: Tensor = source.weight
    bias_O: Tensor = source.bias
    if grow_out:
        weight_OIhw, bias_O = _double(weight_OIhw, block), _double(bias_O, block)
    if grow_in:
        shape = (*weight_OIhw.shape[:2], 1, 1)
        share = (0.5 + 0.5 * (torch.rand(shape, generator=generator) - 0.5)).to(weight_OIhw)  # between 1/4 and 3/4
        weight_OIhw = torch.stack([weight_OIhw * share, weight_OIhw * (1 - share)], dim=2).flatten(1, 2)
    target.weight.copy_(weight_OIhw)
    target.bias.copy_(bias_O)


def _double(tensor: Tensor, block: int) -> Tensor:
    return tensor.unflatten(0, (-1, block)).repeat_interleave(2, dim=0).flatten(0, 1)
