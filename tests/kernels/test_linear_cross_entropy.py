"""linear_cross_entropy == its reference, forward and backward, in any number of blocks, and it never holds all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nextflow.kernels import linear_cross_entropy_chunked as chunked
from nextflow.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref

SMALL = chunked.Sizes(block=500, kept=3000, group=7)
TINY = chunked.Sizes(block=1, kept=1, group=1)


def case(N, D, V, ignored):
    target = torch.randint(0, V, (N,))
    target[torch.rand(N) < ignored] = -100
    return torch.randn(N, D), torch.randn(V, D), target, torch.rand(N)


def value_of(out, gradient_of, slope):
    if gradient_of == "total":
        return 3 * out.total
    loss = (out.loss_N * slope).sum()
    return loss if gradient_of == "loss" else loss + (out.entropy_N * slope.flip(0)).sum()


@pytest.mark.parametrize("sizes", [TINY, SMALL, chunked.SIZES["cpu"]], ids=["tiny", "small", "default"])
@pytest.mark.parametrize(
    ("N", "D", "V", "ignored"), [(5, 7, 123, 0.0), (33, 16, 64, 0.5), (4, 3, 5, 1.0), (1, 1, 2, 0.0)]
)
@pytest.mark.parametrize("gradient_of", ["loss", "loss and entropy", "total"])
def test_equals_reference_forward_and_backward(monkeypatch, N, D, V, ignored, gradient_of, sizes):
    monkeypatch.setitem(chunked.SIZES, "cpu", sizes)
    x, weight, target, slope = case(N, D, V, ignored)
    results = []
    for op in (linear_cross_entropy, linear_cross_entropy_ref):
        xx, ww = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = op(xx, ww, target, -100, slope if gradient_of == "total" else None, entropy=True)
        value_of(out, gradient_of, slope).backward()
        results.append((out, xx.grad, ww.grad))
    (ours, x_grad, w_grad), (ref, x_ref, w_ref) = results
    for name in ("loss_N", "total", "entropy_N", "log_prob_N"):
        torch.testing.assert_close(getattr(ours, name), getattr(ref, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.correct_N, ref.correct_N)
    ignored_N = target == -100
    assert not any(values[ignored_N].any() for values in (ours.loss_N, ours.correct_N, ours.entropy_N))
    torch.testing.assert_close(x_grad, x_ref, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w_grad, w_ref, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient_of", ["loss", "total"])
def test_bfloat16_autocast_keeps_the_softmax_in_float32(monkeypatch, gradient_of):
    monkeypatch.setitem(chunked.SIZES, "cpu", SMALL)
    x, weight, target, slope = case(65, 32, 301, 0.2)
    xx, ww = x.clone().requires_grad_(), (weight * 0.1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_cross_entropy(xx, ww, target, -100, slope if gradient_of == "total" else None)
    value_of(out, gradient_of, slope).backward()
    assert out.loss_N.dtype == xx.grad.dtype == ww.grad.dtype == torch.float32
    x_ref, w_ref = x.clone().requires_grad_(), ww.detach().clone().requires_grad_()
    ref = linear_cross_entropy_ref(x_ref, w_ref, target, -100, slope)
    value_of(ref, gradient_of, slope).backward()
    torch.testing.assert_close(out.loss_N, ref.loss_N, rtol=1e-2, atol=2e-2)
    assert (xx.grad - x_ref.grad).norm() < 1e-2 * x_ref.grad.norm()
    assert (ww.grad - w_ref.grad).norm() < 1e-2 * w_ref.grad.norm()


def test_log_probabilities_have_the_numerics_of_a_sampler():
    """The ratio of GRPO is 1 only if the learner's log-probabilities are those of log_softmax over the 16-bit logits."""
    x, weight, target, _ = case(40, 32, 500, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, target).log_prob_N
        sampled = torch.nn.functional.linear(x, weight).float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(ours, sampled, rtol=1e-6, atol=1e-5)


def test_float16_makes_the_gradient_after_the_loss_is_scaled():
    x, weight, target, slope = case(6, 8, 4000, 0.0)
    x, weight = (x * 0.1).half().requires_grad_(), (weight * 0.1).half().requires_grad_()
    # Weights so small that the gradient of the unscaled total is 0 in float16.
    out = linear_cross_entropy(x, weight, target, -100, slope * 1e-6)
    (out.total * 2.0**16).backward()
    assert weight.grad[0].any()


def test_frozen_head_and_frozen_states_get_no_gradient():
    x, weight, target, slope = case(6, 4, 9, 0.0)
    for token_weight in (None, slope):
        for trained in (0, 1):
            inputs = [x.clone(), weight.clone()]
            inputs[trained].requires_grad_()
            linear_cross_entropy(*inputs, target, -100, token_weight).total.backward()
            assert inputs[trained].grad is not None and inputs[1 - trained].grad is None
            with torch.no_grad():
                assert not linear_cross_entropy(*inputs, target, -100, token_weight).total.requires_grad


def test_gradient_of_the_total_is_handed_out_once():
    x, weight, target, slope = case(6, 4, 9, 0.0)
    out = linear_cross_entropy(x.requires_grad_(), weight, target, -100, slope)
    assert not out.loss_N.requires_grad
    out.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        out.total.backward()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("weighted", [False, True])
def test_never_holds_all_logits(monkeypatch, weighted):
    monkeypatch.setitem(chunked.SIZES, "cpu", chunked.Sizes(block=2000, kept=4 * 2000, group=50))
    N, D, V = 300, 8, 400
    x, weight, target, slope = case(N, D, V, 0.1)
    x.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        linear_cross_entropy(x, weight, target, -100, slope if weighted else None, entropy=True).total.backward()
    assert largest.elements < N * V / 10


def test_unknown_implementation_names_those_that_exist():
    x, weight, target, _ = case(2, 3, 4, 0.0)
    with pytest.raises(ValueError, match="none of 'auto', 'chunked', 'triton', 'reference'"):
        linear_cross_entropy(x, weight, target, implementation="liger")
