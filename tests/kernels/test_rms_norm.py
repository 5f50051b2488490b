"""rms_norm == its reference, forward and backward."""

import pytest
import torch

from nextflow.kernels import rms_norm as module
from nextflow.kernels.rms_norm import rms_norm, rms_norm_ref


@pytest.mark.parametrize("shape", [(4, 8), (3, 5, 123), (1, 1), (0, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float64, 1e-5)])
def test_equals_reference_forward_and_backward(monkeypatch, shape, dtype, tolerance):
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 300)  # several pieces
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1])
    slope = torch.randn(shape)
    results = []
    for op in (rms_norm, rms_norm_ref):
        xx, ww = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = op(xx, ww, 1e-6)
        assert y.dtype == dtype
        (y.float() * slope).sum().backward()
        results.append((y.float(), xx.grad.float(), ww.grad))
    for ours, ref in zip(*results):
        torch.testing.assert_close(
            ours, ref, rtol=tolerance, atol=tolerance * max(1.0, ref.abs().amax().item() if ref.numel() else 0.0)
        )
