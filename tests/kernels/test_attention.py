"""attention == its reference under the visibility law; a named implementation runs or raises."""

import importlib.util
import itertools

import pytest
import torch
import torch._dynamo.testing

from nextflow.kernels import attention as module
from nextflow.kernels import attention_flex, attention_pieces, attention_spans, visibility
from nextflow.kernels.attention import Visibility, attention, attention_ref
from nextflow.sequence.documents import Document, ImageSegment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out

ON_CPU = ["auto", "sdpa", "dense", "spans"]


def packed(B, L, block_length=2):
    """Documents of random length, blocks of random length inside them, padding at the end."""
    document, block = torch.full((B, L), -1), torch.zeros(B, L, dtype=torch.int64)
    for b in range(B):
        end = L - b % 3
        cut = end // 3
        document[b, :cut], document[b, cut:end] = 0, 1
        for start, stop in ((0, cut), (cut, end)):
            block[b, start:stop] = (torch.rand(stop - start) < 1 / block_length).long().cumsum(0)
    return Visibility(document, block)


def packs_of_text_and_scales():
    """Rows as `lay_out` makes them: text before, behind and between pictures of several scales, text alone, padding."""
    vocabulary = Vocabulary(text_size=10, codebook_size=10, start_id=0, end_id=1)
    square, wide = ((1, 1), (2, 2), (3, 3), (5, 5), (9, 9)), ((1, 1), (1, 3), (4, 17))

    def document(*parts):
        return Document(
            segments=tuple(
                TextSegment(ids=[2] * part) if isinstance(part, int) else ImageSegment(grids=part) for part in parts
            )
        )

    rows = [
        [document(7, square), document(square, 3), document(2, wide, 4, square)],
        [document(150), document(wide)],
        [document(9)],
    ]
    packed_rows = lay_out(rows, vocabulary, LayoutConfig())
    return Visibility(packed_rows.document_BL, packed_rows.block_BL)


def results_of(op, inputs, law, implementation, slope, dtype=torch.float32):
    """[result, gradients of q, k and v] in float32."""
    copies = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
    out = op(*copies, law, implementation)
    assert out.dtype == dtype
    (out.float() * slope).sum().backward()
    return [out.float(), *(tensor.grad.float() for tensor in copies)]


def inputs_of(B, H, G, L, D):
    return [torch.randn(B, heads, L, D) for heads in (H, G, G)], torch.randn(B, H, L, D)


@pytest.mark.parametrize(
    ("B", "H", "G", "L", "D"), [(2, 4, 2, 16, 8), (3, 3, 3, 13, 6), (1, 6, 1, 37, 10), (1, 1, 1, 1, 2)]
)
@pytest.mark.parametrize("implementation", ON_CPU)
def test_equals_reference_forward_and_backward(B, H, G, L, D, implementation):
    inputs, slope = inputs_of(B, H, G, L, D)
    law = packed(B, L)
    ours = results_of(attention, inputs, law, implementation, slope)
    for our, ref in zip(ours, results_of(attention_ref, inputs, law, "auto", slope)):
        torch.testing.assert_close(our, ref, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "dense", "spans", "reference"])
@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 3), (3, 1)])
def test_packs_of_text_and_scales_equal_masked_sdpa(H, G, implementation):
    law = packs_of_text_and_scales()
    assert (law.document_BL == -1).any()
    B, L = law.document_BL.shape
    inputs, slope = inputs_of(B, H, G, L, 16)

    def sdpa(q, k, v, law, _):
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=law.mask_BLL()[:, None])

    ours = results_of(attention, inputs, law, implementation, slope)
    for our, ref in zip(ours, results_of(sdpa, inputs, law, None, slope)):
        torch.testing.assert_close(our, ref, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_views_of_one_projection_get_their_gradients(implementation):
    """As in the model: q, k and v are transposed slices of one projection, the gradient comes transposed."""
    law = packs_of_text_and_scales()
    B, L = law.document_BL.shape
    storage, slope = torch.randn(B, L, 8, 6), torch.randn(B, L, 4, 6)
    gradients = []
    for name in (implementation, "reference"):
        qkv = storage.clone().requires_grad_()
        out = attention(*qkv.transpose(1, 2).split((4, 2, 2), dim=1), law, name)
        (out.transpose(1, 2) * slope).sum().backward()
        gradients.append(qkv.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_bfloat16_stays_near_the_reference(implementation):
    inputs, slope = inputs_of(2, 4, 2, 90, 8)
    inputs = [tensor.bfloat16().float() for tensor in inputs]
    law = packed(2, 90, block_length=9)
    ours = results_of(attention, inputs, law, implementation, slope, torch.bfloat16)
    for our, ref in zip(ours, results_of(attention_ref, inputs, law, "auto", slope)):
        assert (our - ref).norm() < 2e-2 * ref.norm()


@pytest.mark.parametrize("limits", [(64, 128, 2**20), (3, 5, 40), (1, 1, 1)], ids=["default", "small", "tiny"])
@pytest.mark.parametrize("block_length", [1, 4, 70])
@pytest.mark.parametrize("stacked", [0, 100, 320])
def test_spans_and_stacks_are_exact_wherever_they_are_cut(monkeypatch, limits, block_length, stacked):
    whole, shared, elements = limits
    monkeypatch.setattr(visibility, "WHOLE_BLOCK", whole)
    monkeypatch.setattr(visibility, "SHARED_SPAN", shared)
    monkeypatch.setattr(visibility, "STACKED_DOCUMENT", {torch.float32: stacked})
    monkeypatch.setattr(attention_spans, "PIECE_ELEMENTS", elements)
    inputs, slope = inputs_of(2, 4, 2, 230, 6)
    law = packed(2, 230, block_length)
    ours = results_of(attention, inputs, law, "spans", slope)
    for our, ref in zip(ours, results_of(attention_ref, inputs, law, "auto", slope)):
        torch.testing.assert_close(our, ref, rtol=1e-4, atol=1e-5)


def test_spans_hold_little_more_than_what_is_visible():
    """Three documents: 64 text ids and scales of 1, 4, 9, ... 256 cells; a text of 400 ids; a picture and text behind it."""
    scales = [side * side for side in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)]
    law = law_of([1] * 64 + scales, [1] * 400, scales + [1] * 64)
    spans = law.spans(torch.float32)
    covered = torch.cat([torch.arange(span.queries.start, span.queries.stop) for span in spans])
    assert torch.equal(covered, torch.arange(law.document_BL.numel())) and not law.stacks(2**20, torch.float32)
    visible = int(law.mask_BLL().sum())
    assert visible <= sum(span.pairs for span in spans) < 1.2 * visible


def test_short_documents_of_one_length_are_stacked():
    """Three of 200 to 216 positions, one of 30, and one that is too long for it."""
    law = law_of([1] * 10 + [206], [1] * 200, [1] * 30, [400], [1] * 12 + [200])
    longer, shorter = law.stacks(2**20, torch.bfloat16)
    assert longer.position_nm.shape == (3, 216) and shorter.position_nm.shape == (1, 30)
    assert [(span.queries.start, span.queries.stop) for span in law.spans(torch.bfloat16)] == [(446, 846)]
    assert len(longer.behind_P) == 16 + 4 and longer.bias_n1mm.dtype == torch.bfloat16
    flat = torch.cat([stack.position_nm.flatten()[stack.real_P] for stack in (longer, shorter)])
    outside = torch.cat([torch.arange(446), torch.arange(846, law.document_BL.numel())])
    assert torch.equal(flat.sort().values, outside)
    assert [len(stack.position_nm) for stack in law.stacks(2 * 216**2, torch.bfloat16)] == [2, 1, 1]
    assert [stack.position_nm.shape for stack in law.stacks(2**20, torch.float32)] == [(1, 30)]  # 200 are long there


def law_of(*documents):
    """One row of documents, each given by the lengths of its blocks."""
    document = torch.cat([torch.full((sum(blocks),), d) for d, blocks in enumerate(documents)])
    block = torch.cat([torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks)) for blocks in documents])
    return Visibility(document[None], block[None])


def test_law_by_brute_force():
    law = packed(3, 11)
    mask = law.mask_BLL()
    for b in range(3):
        for q in range(11):
            for k in range(11):
                same = law.document_BL[b, q] == law.document_BL[b, k]
                assert mask[b, q, k] == (same and law.block_BL[b, k] <= law.block_BL[b, q])


@pytest.mark.parametrize(("H", "G", "D"), [(4, 2, 16), (2, 2, 128)])
def test_flex_equals_reference_on_forward(H, G, D):
    """A length that no tile divides, padding, documents and blocks; its backward pass exists on CUDA alone."""
    for law in (packed(3, 20), packs_of_text_and_scales()):
        B, L = law.document_BL.shape
        q, k, v = (torch.randn(B, heads, L, D) for heads in (H, G, G))
        with torch.no_grad():
            ours = attention(q, k, v, law, "flex")
        torch.testing.assert_close(ours, attention_ref(q, k, v, law), rtol=1e-4, atol=1e-5)


def test_flex_masks_compile_once_for_packs_of_any_length():
    """On CUDA the mask is built compiled, per batch: a new batch, or a new length, must not compile again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    # What `attention_flex` does on CUDA, with a compiler that only counts.
    build = torch.compile(attention_flex.create, dynamic=True, backend=counter)
    for L in (256, 300, 300, 517):
        law = packed(2, L)
        ours = build(law.document_BL, law.block_BL)
        assert torch.equal(ours.to_dense(), attention_flex.create(law.document_BL, law.block_BL).to_dense())
    assert counter.frame_count <= 2  # the first length may be taken for a constant
    torch._dynamo.reset()


def test_decoding_masks():
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    visible = torch.rand(2, 3, 9) > 0.3
    visible[..., 0] = True
    of_keys = visible[:, :1]  # the same for all queries
    for mask, implementation in itertools.product((visible, of_keys, None), ("auto", "sdpa", "dense")):
        ours = attention(q, k, v, mask, implementation)
        torch.testing.assert_close(ours, attention_ref(q, k, v, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elements", [2**20, 16 * 9, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_equal_the_reference_wherever_they_are_cut(monkeypatch, elements, dtype):
    """A scale of 40 queries, strided as in the model, behind a buffer with room; every row sees some keys or all."""
    monkeypatch.setattr(attention_pieces, "PIECE_ELEMENTS", elements)
    q = torch.randn(2, 40, 4, 8).transpose(1, 2).to(dtype)
    k, v = (torch.randn(2, 2, 12, 8)[:, :, :9].to(dtype) for _ in range(2))
    of_keys = torch.arange(9) < torch.tensor([[9], [4]])
    for mask in (of_keys[:, None], None):
        ours = attention(q, k, v, mask, "pieces")
        assert ours.dtype == dtype
        theirs = attention_ref(q.float(), k.float(), v.float(), mask)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


def test_auto_takes_pieces_for_a_large_scale_in_bfloat16_unless_the_fused_kernel_has_tiles(monkeypatch):
    monkeypatch.setattr(attention_pieces, "has_amx", lambda: False)

    def chosen(N, dtype, mask=None, grad=False):
        q, k = torch.empty(1, 4, N, 8, dtype=dtype, requires_grad=grad), torch.empty(1, 2, N + 3, 8, dtype=dtype)
        return module._choose(q, k, mask)

    of_keys, of_pairs = torch.ones(1, 1, 131, dtype=torch.bool), torch.ones(1, 128, 131, dtype=torch.bool)
    assert chosen(128, torch.bfloat16) == chosen(128, torch.bfloat16, of_keys) == "pieces"
    assert chosen(127, torch.bfloat16) == chosen(128, torch.float32) == "sdpa"
    assert chosen(128, torch.bfloat16, of_pairs) == chosen(128, torch.bfloat16, grad=True) == "sdpa"
    monkeypatch.setattr(attention_pieces, "has_amx", lambda: True)
    assert chosen(128, torch.bfloat16) == "sdpa"


def test_masks_tiles_and_spans_are_built_once():
    law = packed(2, 8)
    assert law.bias_B1LL(torch.float32) is law.bias_B1LL(torch.float32)
    assert law.block_mask() is law.block_mask()
    assert law.spans(torch.float32) is law.spans(torch.float32)
    assert law.stacks(9, torch.float32) is law.stacks(9, torch.float32)


def test_auto_takes_what_has_the_least_to_do():
    def chosen(law, H, dtype):
        B, L = law.document_BL.shape
        return module._choose(torch.empty(B, H, L, 8, dtype=dtype), torch.empty(B, 1, L, 8, dtype=dtype), law)

    short, many = packed(8, 40), Visibility(torch.arange(3000)[None] // 300, torch.arange(3000)[None] // 100)
    assert chosen(short, 4, torch.bfloat16) == "dense"
    assert chosen(short, 4, torch.float32) == "sdpa"
    assert chosen(many, 4, torch.bfloat16) == chosen(many, 4, torch.float32) == "spans"
    scattered = Visibility(torch.arange(3000)[None] % 10, torch.arange(3000)[None])
    assert chosen(scattered, 8, torch.bfloat16) == "sdpa"
    assert module._choose(torch.empty(1, 1, 1, 8), torch.empty(1, 1, 1, 8), None) == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex trains on CUDA")
def test_named_implementation_raises_where_it_cannot_run():
    law = packed(1, 8)
    q = torch.randn(1, 1, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="'flex' has no backward on CPU"):
        attention(q, q, q, law, "flex")
    for name in ("flex", "spans"):
        with pytest.raises(ValueError, match=f"'{name}' needs the documents and blocks of a packed batch"):
            attention(q, q, q, None, name)
    with pytest.raises(ValueError, match="'pieces' is for steps of cached decoding, but a gradient is asked for"):
        attention(q, q, q, None, "pieces")
    with pytest.raises(ValueError, match="queries of one row may see different keys"):
        attention(q.detach(), q.detach(), q.detach(), law, "pieces")
    scattered = Visibility(torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]]), torch.arange(8)[None])
    with pytest.raises(ValueError, match="'spans' needs each document in one piece"):
        attention(q, q, q, scattered, "spans")
    with pytest.raises(ValueError, match="'triton'"):
        attention(q, q, q, law, "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash may run on CUDA")
def test_flash_says_why_it_cannot_run():
    q = torch.randn(1, 1, 8, 8)
    mask, text = torch.ones(1, 8, 8, dtype=torch.bool), Visibility(torch.zeros(1, 8), torch.arange(8)[None])
    for law in (packed(1, 8), mask):
        with pytest.raises(ValueError, match="'flash' is for calls without a mask or rows of one plain text"):
            attention(q, q, q, law, "flash")
    why = "on CUDA in float16 or bfloat16" if importlib.util.find_spec("flash_attn") else "is not installed"
    for law in (text, None):
        with pytest.raises(ValueError, match=why):
            attention(q, q, q, law, "flash")


def test_plain_text_is_causal():
    L = 7
    assert Visibility(torch.zeros(2, L), torch.arange(L).expand(2, L)).is_causal()
    assert not Visibility(torch.zeros(1, L), torch.arange(L)[None] // 2).is_causal()
    assert not Visibility(torch.arange(L)[None] // 4, torch.arange(L)[None]).is_causal()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["flex", "flash"])
def test_equals_reference_on_cuda(name):
    if name == "flash":
        pytest.importorskip("flash_attn")
    dtype = torch.bfloat16 if name == "flash" else torch.float32
    law = packed(2, 300)
    law = Visibility(law.document_BL.cuda(), law.block_BL.cuda()) if name == "flex" else None
    inputs, slope = inputs_of(2, 4, 2, 300, 64)
    inputs, slope = [tensor.cuda() for tensor in inputs], slope.cuda()
    ours = results_of(attention, inputs, law, name, slope, dtype)
    for our, ref in zip(ours, results_of(attention_ref, inputs, law, "auto", slope)):
        torch.testing.assert_close(our, ref, rtol=2e-2, atol=2e-2)
