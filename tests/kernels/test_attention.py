"""attention == its reference under the visibility law; a named implementation runs or raises."""

import itertools

import pytest
import torch

from nextflow.kernels.attention import Visibility, attention, attention_ref


def packed(B, L):
    """Documents of random length, blocks of random length inside them, padding at the end."""
    document, block = torch.full((B, L), -1), torch.zeros(B, L, dtype=torch.int64)
    for b in range(B):
        end = L - b % 3
        cut = end // 3
        document[b, :cut], document[b, cut:end] = 0, 1
        for start, stop in ((0, cut), (cut, end)):
            block[b, start:stop] = torch.randint(0, 2, (stop - start,)).cumsum(0)
    return Visibility(document, block)


@pytest.mark.parametrize(
    ("B", "H", "G", "L", "D"), [(2, 4, 2, 16, 8), (3, 3, 3, 13, 6), (1, 6, 1, 37, 10), (1, 1, 1, 1, 2)]
)
@pytest.mark.parametrize("implementation", ["auto", "sdpa", "dense"])
def test_equals_reference_forward_and_backward(B, H, G, L, D, implementation):
    visibility = packed(B, L)
    slope = torch.randn(B, H, L, D)
    shapes = ((B, H, L, D), (B, G, L, D), (B, G, L, D))
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for op in (attention, attention_ref):
        copies = [tensor.clone().requires_grad_() for tensor in inputs]
        out = op(*copies, visibility, implementation)
        (out * slope).sum().backward()
        results.append([out, *(tensor.grad for tensor in copies)])
    for ours, ref in zip(*results):
        torch.testing.assert_close(ours, ref, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "sdpa", "dense"])
def test_bfloat16_stays_near_the_reference(implementation):
    visibility = packed(2, 21)
    q, k, v = (torch.randn(2, heads, 21, 8).bfloat16() for heads in (4, 2, 2))
    ours = attention(q, k, v, visibility, implementation)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(
        ours.float(), attention_ref(q.float(), k.float(), v.float(), visibility), rtol=3e-2, atol=3e-2
    )


def test_law_by_brute_force():
    visibility = packed(3, 11)
    mask = visibility.mask_BLL()
    for b in range(3):
        for q in range(11):
            for k in range(11):
                same = visibility.document_BL[b, q] == visibility.document_BL[b, k]
                assert mask[b, q, k] == (same and visibility.block_BL[b, k] <= visibility.block_BL[b, q])


def test_flex_equals_reference_on_forward():
    visibility = packed(2, 20)
    q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    with torch.no_grad():
        ours = attention(q, k, v, visibility, "flex")
    torch.testing.assert_close(ours, attention_ref(q, k, v, visibility), rtol=1e-4, atol=1e-5)


def test_decoding_masks():
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    visible = torch.rand(2, 3, 9) > 0.3
    visible[..., 0] = True
    for mask, implementation in itertools.product((visible, None), ("auto", "sdpa", "dense")):
        ours = attention(q, k, v, mask, implementation)
        torch.testing.assert_close(ours, attention_ref(q, k, v, mask), rtol=1e-4, atol=1e-5)


def test_masks_are_built_once():
    visibility = packed(2, 8)
    assert visibility.bias_B1LL(torch.float32) is visibility.bias_B1LL(torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex trains on CUDA")
def test_named_implementation_raises_where_it_cannot_run():
    visibility = packed(1, 8)
    q = torch.randn(1, 1, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="'flex' has no backward on CPU"):
        attention(q, q, q, visibility, "flex")
    with pytest.raises(ValueError, match="packed batch"):
        attention(q, q, q, None, "flex")
    with pytest.raises(ValueError, match="'triton'"):
        attention(q, q, q, visibility, "triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_flex_equals_reference_on_cuda():
    visibility = packed(2, 300)
    visibility = Visibility(visibility.document_BL.cuda(), visibility.block_BL.cuda())
    inputs = [torch.randn(2, heads, 300, 64, device="cuda") for heads in (4, 2, 2)]
    results = []
    for op, name in ((attention, "flex"), (attention_ref, "auto")):
        copies = [tensor.clone().requires_grad_() for tensor in inputs]
        out = op(*copies, visibility, name)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in copies)])
    for ours, ref in zip(*results):
        torch.testing.assert_close(ours, ref, rtol=2e-2, atol=2e-2)
