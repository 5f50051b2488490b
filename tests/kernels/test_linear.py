"""linear == its reference for any number of positions; gradients and other dtypes take torch's."""

import pytest
import torch

from nextflow.kernels import linear as module
from nextflow.kernels.linear import linear, linear_ref


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 7), (2, 1), (191,), (192,), (0,)])
@pytest.mark.parametrize("outputs", [1, 23, 64])
def test_equals_reference(monkeypatch, shape, outputs):
    """Parts of 10 rows, the last one shorter; the matrix is a slice, as the head's."""
    monkeypatch.setattr(module, "PART_ELEMENTS", 10 * 12 // torch.get_num_threads())
    x, weight = torch.randn(*shape, 12), torch.randn(100, 12)[5 : 5 + outputs]
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), linear_ref(x, weight))
        torch.testing.assert_close(linear(x.bfloat16(), weight.bfloat16()), linear_ref(x.bfloat16(), weight.bfloat16()))


def test_gradients_flow(monkeypatch):
    monkeypatch.setattr(module, "PART_ELEMENTS", 1)
    x, weight = torch.randn(3, 12, requires_grad=True), torch.randn(64, 12, requires_grad=True)
    ours = torch.autograd.grad(linear(x, weight).square().sum(), (x, weight))
    theirs = torch.autograd.grad(linear_ref(x, weight).square().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
