"""The cached matrices compute what F.interpolate computes."""

import pytest
import torch
import torch.nn.functional as F

from nextflow.models.tokenizer.resample import resample


@pytest.mark.parametrize("source", [(1, 1), (8, 8), (7, 12), (16, 5)])
@pytest.mark.parametrize("target", [(1, 1), (2, 3), (8, 8), (13, 4), (16, 20)])
@pytest.mark.parametrize("mode", ["area", "bicubic"])
def test_equals_interpolate_forward_and_backward(source, target, mode):
    x = torch.randn(2, 3, *source, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_theirs = resample(ours, target, mode), F.interpolate(theirs, size=target, mode=mode)
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(y_theirs)
    (y_ours * weight).sum().backward()
    (y_theirs * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_matrices_made_under_inference_mode_serve_training():
    with torch.inference_mode():
        resample(torch.randn(1, 1, 11, 11), (3, 3), "area")
    x = torch.randn(1, 1, 11, 11, requires_grad=True)
    resample(x, (3, 3), "area").sum().backward()
    assert x.grad is not None
