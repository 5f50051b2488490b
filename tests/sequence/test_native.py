"""Any size becomes a multiple of the stride: padding repeats the edge, cutting keeps the centre."""

import pytest
import torch
import torch.nn.functional as F

from nextflow.sequence.native import fit_to_stride


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (9, 16), (3, 21)])
def test_padding_repeats_the_edge_below_and_on_the_right(size):
    image_CHW = torch.randn(3, *size)
    expected_CHW = F.pad(image_CHW[None], (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")[0]
    assert torch.equal(fit_to_stride(image_CHW, 8), expected_CHW)
    pixels_CHW = (image_CHW * 50 + 128).clamp(0, 255).to(torch.uint8)
    fitted_CHW = fit_to_stride(pixels_CHW, 8)
    assert fitted_CHW.dtype == torch.uint8 and torch.equal(fitted_CHW[:, : size[0], : size[1]], pixels_CHW)


def test_cutting_keeps_the_centre():
    image_CHW = torch.arange(3 * 13 * 19).view(3, 13, 19)
    assert torch.equal(fit_to_stride(image_CHW, 8, "crop"), image_CHW[:, 2:10, 1:17])


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="7 x 20 pixels is smaller than one cell of 8: pad"):
        fit_to_stride(torch.zeros(3, 7, 20), 8, "crop")
    with pytest.raises(ValueError, match="0 x 20 pixels is empty"):
        fit_to_stride(torch.zeros(3, 0, 20), 8)
