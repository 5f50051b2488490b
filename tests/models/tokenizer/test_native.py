"""Images of mixed sizes: one by one or together, padded or cut, the codes are theirs and the pictures have their size."""

import pytest
import torch

from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.native import decode_images, encode_images
from nextflow.models.tokenizer.quantizer import Correction
from nextflow.sequence.native import fit_to_stride
from nextflow.sequence.scales import ScaleSchedule, num_codes_of

SCHEDULE = ScaleSchedule(sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8)
SIZES = [(40, 33), (32, 32), (17, 90), (40, 33), (33, 40), (8, 5), (40, 33), (32, 32)]


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    semantic = SemanticConfig(
        width=16, mlp_width=32, num_layers=1, num_heads=2, num_patches=16, decoder_layers=1, decoder_width=16, decoder_heads=2
    )  # fmt: skip
    pixel = PixelConfig(
        layout="patchified", width=16, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=8
    )
    config = TokenizerConfig(
        schedule=SCHEDULE, codebook_size=64, semantic_dim=8, pixel_dim=4, semantic=semantic, pixel=pixel
    )
    return Tokenizer(config).eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) * 2 - 1 for size in SIZES]


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_together_as_one_by_one(tokenizer, images, fit):
    images = [image_CHW for image_CHW in images if fit == "pad" or min(image_CHW.shape[1:]) >= 8]
    together = encode_images(tokenizer, images, fit=fit, max_batch=2)
    pictures = decode_images(tokenizer, together, max_batch=2)
    for image_CHW, codes, picture_CHW in zip(images, together, pictures):
        fitted_CHW = fit_to_stride(image_CHW, 8, fit)
        grids = SCHEDULE.native_grids(*fitted_CHW.shape[1:])
        assert codes.grids == grids and codes.size == tuple(image_CHW.shape[1:])
        alone_N = tokenizer.encode(fitted_CHW[None], grids).target_codes_BN[0]
        assert torch.equal(codes.codes_N, alone_N) and len(alone_N) == num_codes_of(grids)
        alone_CHW = tokenizer.decode(alone_N[None], grids)[0]
        if fit == "pad":
            height, width = image_CHW.shape[1:]
            assert codes.padding == (-height % 8, -width % 8)
            alone_CHW = alone_CHW[:, :height, :width]
            assert picture_CHW.shape == image_CHW.shape
        else:
            assert codes.padding == (0, 0) and picture_CHW.shape == fitted_CHW.shape
        torch.testing.assert_close(picture_CHW, alone_CHW)


def test_a_bucket_is_encoded_as_by_its_level(tokenizer):
    images_BCHW = torch.rand(2, 3, *SCHEDULE.pixels(64, 0.5)) * 2 - 1
    codes_BN = tokenizer.encode(images_BCHW, SCHEDULE.grids(64, 0.5)).target_codes_BN
    assert torch.equal(torch.stack([codes.codes_N for codes in encode_images(tokenizer, list(images_BCHW))]), codes_BN)


def test_self_correction_passes_through(tokenizer, images):
    correction = Correction(fraction=0.6, temperature=5.0)
    drawn = [encode_images(tokenizer, images, correction=correction, max_batch=count) for count in (16, 1)]
    for first, second in zip(*drawn):
        assert torch.equal(first.input_codes_N, second.input_codes_N)
    assert any(not torch.equal(codes.input_codes_N, codes.codes_N) for codes in drawn[0])
    assert all(codes.input_codes_N is None for codes in encode_images(tokenizer, images))


def test_what_is_no_image_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"image 1 is torch\.uint8 \(3, 8, 8\), not float"):
        encode_images(tokenizer, [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="max_batch"):
        encode_images(tokenizer, [torch.zeros(3, 8, 8)], max_batch=0)
