"""Taps are the resize that torch's interpolate does."""

import pytest
import torch
from torch.nn import functional as F

from nextflow.sequence.resize import taps

PAIRS = [((1, 1), (1, 3)), ((1, 1), (2, 2)), ((2, 4), (3, 6)), ((5, 5), (8, 8)), ((3, 7), (4, 8)), ((4, 4), (4, 4))]


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_taps_equal_interpolate(source: tuple, target: tuple, mode: str) -> None:
    torch.manual_seed(0)
    map_CHW = torch.randn(6, *source)
    options = {} if mode == "nearest" else {"align_corners": False}
    expected_CP = F.interpolate(map_CHW[None], size=target, mode=mode, **options)[0].flatten(1)
    gather = taps(source, target, mode)
    index_PT, weight_PT = torch.from_numpy(gather.index_PT), torch.from_numpy(gather.weight_PT)
    resized_CP = (map_CHW.flatten(1)[:, index_PT] * weight_PT).sum(-1)
    torch.testing.assert_close(resized_CP, expected_CP, atol=1e-5, rtol=0)
    torch.testing.assert_close(weight_PT.sum(-1), torch.ones(len(weight_PT)))


def test_unknown_mode_names_the_key() -> None:
    with pytest.raises(ValueError, match=r"layout\.interpolation"):
        taps((1, 1), (2, 2), "lanczos")
