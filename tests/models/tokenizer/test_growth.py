"""The doubled decoder computes what the trained one computes; it has twice the channels and blocks; twins learn apart."""

import pytest
import torch
from torch import nn

from nextflow.models.tokenizer.config import PixelConfig
from nextflow.models.tokenizer.growth import grow_decoder
from nextflow.models.tokenizer.pixel import PixelDecoder, ResidualBlock

LAYOUTS = {
    "patchified": PixelConfig(
        layout="patchified", width=16, multipliers=(1, 2), num_blocks=2, stem=4, latent_width=24, groups=8
    ),
    "vqgan": PixelConfig(width=16, multipliers=(1, 1, 2), num_blocks=1, latent_width=24, groups=8),
    "vqgan without attention": PixelConfig(
        width=16, multipliers=(1, 1, 2), num_blocks=2, latent_width=24, groups=8, attention=False
    ),
    "patchified with attention": PixelConfig(
        layout="patchified", width=16, multipliers=(2, 1), num_blocks=1, stem=2, latent_width=8, groups=16
    ),
}


def _decoders(layout):
    torch.manual_seed(0)
    source, target = PixelDecoder(LAYOUTS[layout], 4), PixelDecoder(LAYOUTS[layout], 4, capacity=2)
    for name, parameter in source.named_parameters():  # trained norms are not the identity
        if "norm" in name:
            nn.init.normal_(parameter, 0.8, 0.3)
        elif any(part in name for part in ("query", "key")):  # and trained attention is not uniform
            nn.init.normal_(parameter, 0.0, 1.0)
    grow_decoder(source, target)
    return source, target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_function_more_capacity(layout):
    source, target = _decoders(layout)
    features = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(target(features), source(features), rtol=1e-4, atol=1e-5)
    blocks = [sum(isinstance(m, ResidualBlock) for m in d.stages.modules()) for d in (source, target)]
    assert blocks[1] == 2 * blocks[0]
    assert target.to_pixels.in_channels == 2 * source.to_pixels.in_channels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_pictures_in_bfloat16_up_to_its_rounding(layout):
    source, target = _decoders(layout)
    features = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        exact = source(features)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, grown = source(features).float(), target(features).float()
    error = (rounded - exact).square().mean().sqrt()
    assert (grown - exact).square().mean().sqrt() < 1.5 * error
    assert error < 0.05 * exact.std()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twin_channels_learn_different_things(layout):
    _, target = _decoders(layout)
    target(torch.randn(2, 4, 3, 5)).square().mean().backward()
    gradient = target.from_latent.weight.grad
    assert not torch.allclose(gradient[0::2], gradient[1::2], rtol=1e-2)
