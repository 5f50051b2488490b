"""linear_cross_entropy == its reference, forward and backward, in any number of chunks, and it never holds all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nextflow.kernels import linear_cross_entropy as module
from nextflow.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref


def case(N, D, V, ignored):
    target = torch.randint(0, V, (N,))
    target[torch.rand(N) < ignored] = -100
    return torch.randn(N, D), torch.randn(V, D), target, torch.rand(N)


@pytest.mark.parametrize("chunk_elements", [1, 500, 2**20])
@pytest.mark.parametrize(
    ("N", "D", "V", "ignored"), [(5, 7, 123, 0.0), (33, 16, 64, 0.5), (4, 3, 5, 1.0), (1, 1, 2, 0.0)]
)
def test_equals_reference_forward_and_backward(monkeypatch, N, D, V, ignored, chunk_elements):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": chunk_elements})
    x, weight, target, slope = case(N, D, V, ignored)
    results = []
    for op in (linear_cross_entropy, linear_cross_entropy_ref):
        xx, ww = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = op(xx, ww, target)
        (out.loss_N * slope).sum().backward()
        results.append((out, xx.grad, ww.grad))
    (ours, x_grad, w_grad), (ref, x_ref, w_ref) = results
    torch.testing.assert_close(ours.loss_N, ref.loss_N, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.correct_N, ref.correct_N)
    assert (ours.loss_N[target == -100] == 0).all() and not ours.correct_N[target == -100].any()
    torch.testing.assert_close(x_grad, x_ref, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w_grad, w_ref, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_keeps_the_softmax_in_float32():
    x, weight, target, slope = case(65, 32, 301, 0.2)
    xx, ww = x.clone().requires_grad_(), (weight * 0.1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_cross_entropy(xx, ww, target)
    (out.loss_N * slope).sum().backward()
    assert out.loss_N.dtype == xx.grad.dtype == ww.grad.dtype == torch.float32
    x_ref, w_ref = x.clone().requires_grad_(), ww.detach().clone().requires_grad_()
    ref = linear_cross_entropy_ref(x_ref, w_ref, target)
    (ref.loss_N * slope).sum().backward()
    torch.testing.assert_close(out.loss_N, ref.loss_N, rtol=1e-2, atol=2e-2)
    assert (xx.grad - x_ref.grad).norm() < 1e-2 * x_ref.grad.norm()
    assert (ww.grad - w_ref.grad).norm() < 1e-2 * w_ref.grad.norm()


def test_frozen_head_gets_no_gradient():
    x, weight, target, _ = case(6, 4, 9, 0.0)
    x.requires_grad_()
    linear_cross_entropy(x, weight, target).loss_N.sum().backward()
    assert x.grad is not None and weight.grad is None


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 2000})
    N, D, V = 300, 8, 400
    x, weight, target, _ = case(N, D, V, 0.1)
    x.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        linear_cross_entropy(x, weight, target).loss_N.sum().backward()
    assert largest.elements < N * V / 10
