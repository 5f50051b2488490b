"""The tokenizer as a whole: any grid, codes and pictures, the fingerprint, the configuration's errors."""

from dataclasses import replace

import pytest
import torch

from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.sequence.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8)
PIXEL = PixelConfig(layout="patchified", width=16, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=8)
SEMANTIC = SemanticConfig(
    width=32,
    mlp_width=64,
    num_layers=2,
    num_heads=2,
    num_patches=16,
    decoder_layers=1,
    decoder_width=32,
    decoder_heads=2,
)
CONFIG = TokenizerConfig(
    schedule=SCHEDULE, codebook_size=64, semantic_dim=8, pixel_dim=4, semantic=SEMANTIC, pixel=PIXEL
)


def _tokenizer(config=CONFIG) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(config).eval()


@pytest.mark.parametrize("level, ratio", [(32, 1.0), (64, 1.0), (64, 0.5), (32, 4.0)])
@pytest.mark.parametrize("layout", ["patchified", "vqgan"])
def test_any_grid_from_pictures_to_codes_to_pictures(level, ratio, layout):
    vqgan = PixelConfig(width=8, multipliers=(1, 1, 2, 2), num_blocks=1, latent_width=16, groups=4)
    tokenizer = _tokenizer(CONFIG if layout == "patchified" else replace(CONFIG, pixel=vqgan))
    grids, (height, width) = SCHEDULE.grids(level, ratio), SCHEDULE.pixels(level, ratio)
    images = torch.rand(2, 3, height, width) * 2 - 1
    output = tokenizer(images, grids)
    codes = tokenizer.encode(images, grids).target_codes_BN
    assert codes.shape == (2, SCHEDULE.num_codes(level, ratio))
    assert torch.equal(codes, output.quantizer.indices)
    torch.testing.assert_close(tokenizer.decode(codes, grids), output.images_BCHW, rtol=1e-3, atol=1e-4)
    assert output.images_BCHW.shape == images.shape
    assert output.semantic_BND.shape == (2, grids[-1][0] * grids[-1][1], 32)


def test_images_do_not_depend_on_their_batch():
    tokenizer, grids = _tokenizer(), SCHEDULE.grids(32)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    together = tokenizer.encode(images, grids).target_codes_BN
    alone = torch.cat([tokenizer.encode(image[None], grids).target_codes_BN for image in images])
    assert (together == alone).float().mean() > 0.99  # a tie may fall either way in another matrix product


def test_fingerprint_names_what_decides_codes():
    tokenizer = _tokenizer()
    name = tokenizer.fingerprint()
    assert len(name) == 16 and name == _tokenizer().fingerprint()
    with torch.no_grad():
        tokenizer.pixel_decoder.to_pixels.weight.add_(1)
        tokenizer.semantic_decoder.embed.weight.add_(1)
    assert tokenizer.fingerprint() == name
    for change in ("pixel_encoder.to_code.bias", "semantic_encoder.project.2.bias", "quantizer.pixel_codebook"):
        other = _tokenizer()
        with torch.no_grad():
            other.get_parameter(change).add_(1e-3)
        assert other.fingerprint() != name, change
    assert _tokenizer(replace(CONFIG, pixel_weight=2.0)).fingerprint() != name


def test_config_round_trip():
    import json

    for config in (CONFIG, replace(CONFIG, semantic=None), TokenizerConfig()):
        assert TokenizerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_without_semantic_branch_codes_are_pixels_alone():
    tokenizer = _tokenizer(replace(CONFIG, semantic=None))
    assert tokenizer.code_dim == 4 and tokenizer.quantizer.semantic_codebook.shape == (64, 0)
    output = tokenizer(torch.rand(1, 3, 32, 32), SCHEDULE.grids(32))
    assert output.semantic_BND is None


def test_errors_name_the_key():
    with pytest.raises(ValueError, match=r"pixel.stem.*schedule.stride"):
        replace(CONFIG, pixel=replace(PIXEL, stem=2))
    with pytest.raises(ValueError, match=r"pixel.groups"):
        replace(PIXEL, groups=5)
    with pytest.raises(ValueError, match="decoder_capacity"):
        replace(CONFIG, decoder_capacity=3)
    with pytest.raises(ValueError, match="hidden_state"):
        replace(SEMANTIC, hidden_state=-4)
    with pytest.raises(ValueError, match="last grid"):
        _tokenizer()(torch.rand(1, 3, 40, 40), SCHEDULE.grids(32))
