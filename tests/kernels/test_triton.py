"""Every Triton kernel == its reference, forward and backward, at odd shapes: under Triton's interpreter, or on a GPU.

`tests/conftest.py` turns the interpreter on where there is no GPU.
"""

import pytest
import torch

from nextflow.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from nextflow.kernels.rms_norm import rms_norm, rms_norm_ref
from nextflow.kernels.rope import apply_rope, apply_rope_ref, rope_cos_sin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_named_on_a_cpu_it_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(2, 4)
    for call in (
        lambda: rms_norm(x, x[0], implementation="triton"),
        lambda: apply_rope(x[None, None], x[None, :, :2], x[None, :, :2], "triton"),
        lambda: linear_cross_entropy(x, x, torch.zeros(2, dtype=torch.int64), implementation="triton"),
    ):
        with pytest.raises(ValueError, match="'triton' runs on CUDA"):
            call()


def gradients(op, inputs, slope):
    """(result, gradient of each input) of sum(op(inputs) * slope)."""
    copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = op(*copies)
    (out.float() * slope).sum().backward()
    return [out, *(tensor.grad for tensor in copies)]


def assert_near(ours, refs, tolerance):
    for our, ref in zip(ours, refs, strict=True):
        assert our.dtype == ref.dtype
        our, ref = our.float(), ref.float()
        torch.testing.assert_close(our, ref, rtol=tolerance, atol=tolerance * max(1.0, ref.abs().max().item()))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 123), (19, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm(shape, dtype, tolerance):
    x, weight, slope = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape[-1], device=DEVICE), 0
    slope = torch.randn(shape, device=DEVICE)
    ours = gradients(lambda x, w: rms_norm(x, w, 1e-6, "triton"), (x, weight), slope)
    assert_near(ours, gradients(lambda x, w: rms_norm_ref(x, w, 1e-6), (x, weight), slope), tolerance)


@pytest.mark.parametrize(
    ("B", "H", "L", "sections"), [(2, 4, 6, (2, 3, 3)), (1, 11, 3, (1, 1, 1)), (3, 1, 1, (5, 2, 4))]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rope(B, H, L, sections, dtype, tolerance):
    D = 2 * sum(sections)
    cos, sin = (part.to(dtype) for part in rope_cos_sin(torch.rand(3, B, L, device=DEVICE) * 30, D, 1e4, sections))
    # Strides as in the model: heads transposed, a slice of a larger projection.
    storage = torch.randn(B, L, H + 2, D, device=DEVICE).to(dtype)
    slope = torch.randn(B, H, L, D, device=DEVICE)

    def result(op, name):
        return gradients(lambda s: op(s.transpose(1, 2)[:, :H], cos, sin, name), (storage,), slope)

    assert_near(result(apply_rope, "triton"), result(apply_rope_ref, "auto"), tolerance)


@pytest.mark.parametrize(
    ("N", "D", "V", "ignored"),
    [(5, 7, 123, 0.0), (33, 16, 64, 0.5), (18, 40, 300, 0.2), (4, 3, 5, 1.0), (1, 1, 2, 0.0)],
)
@pytest.mark.parametrize("gradient_of", ["loss", "loss and entropy", "total"])
def test_linear_cross_entropy(N, D, V, ignored, gradient_of):
    target = torch.randint(0, V, (N,), device=DEVICE)
    target[torch.rand(N) < ignored] = -100
    inputs = torch.randn(N, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    slopes = torch.rand(2, N, device=DEVICE)
    results = []
    for op in (linear_cross_entropy, linear_cross_entropy_ref):
        x, weight = (tensor.clone().requires_grad_() for tensor in inputs)
        token_weight = slopes[0] if gradient_of == "total" else None
        out = op(x, weight, target, -100, token_weight, entropy=True, implementation="triton")
        value = out.total if gradient_of == "total" else (out.loss_N * slopes[0]).sum()
        if "entropy" in gradient_of:
            value = value + (out.entropy_N * slopes[1]).sum()
        value.backward()
        results.append((out.loss_N, out.total, out.entropy_N, out.correct_N.float(), x.grad, weight.grad))
    assert_near(*results, 2e-5)


def test_linear_cross_entropy_in_bfloat16_over_several_parts(monkeypatch):
    from nextflow.kernels import linear_cross_entropy_triton as module

    monkeypatch.setattr(module, "PART_ELEMENTS", 19 * 64)
    inputs = torch.randn(19, 24, device=DEVICE), torch.randn(150, 24, device=DEVICE) * 0.3
    target, slope = torch.randint(0, 150, (19,), device=DEVICE), torch.rand(19, device=DEVICE)

    def losses(op):
        def of(x, weight):
            with torch.autocast(DEVICE, torch.bfloat16):
                return op(x, weight, target, implementation="triton").loss_N

        return gradients(of, inputs, slope)

    assert_near(losses(linear_cross_entropy), losses(linear_cross_entropy_ref), 2e-2)
