"""A pack is only a way to batch: loss and gradients equal those of one document per row; weights, alpha and heads."""

import pytest
import torch

from nextflow.lightning_modules.token_metrics import TokenMetrics
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out

SQUARE = ((1, 1), (2, 2), (3, 3), (4, 4))
WIDE = ((1, 1), (1, 3), (2, 5))
TALL = ((1, 1), (2, 1), (5, 2), (6, 3))


def tiny(**changes):
    torch.manual_seed(0)
    config = TransformerConfig(
        text_size=30, codebook_size=25, code_dim=6, start_id=0, end_id=1, width=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, mlp_width=48, rope_sections=(2, 1, 1), init_std=0.2, **{"max_scales": 5, **changes},
    )  # fmt: skip
    return Transformer(config)


def documents():
    generator = torch.Generator().manual_seed(1)

    def image(grids, **changes):
        codes = torch.randint(0, 25, (sum(h * w for h, w in grids),), generator=generator)
        return ImageSegment(grids=grids, codes=codes, **changes)

    def text(length, **changes):
        return TextSegment(ids=torch.randint(2, 30, (length,), generator=generator).tolist(), **changes)

    return [
        Document(segments=(text(5), image(SQUARE))),
        Document(segments=(image(WIDE), text(3))),
        Document(segments=(text(7),)),
        Document(segments=(image(TALL, loss=False), text(2, loss=False), image(WIDE), text(1))),
        Document(segments=(image(((1, 1),)),)),
    ]


def loss_and_gradients(model, rows):
    model.zero_grad()
    tokens = model.cross_entropy(model(rows), rows.target_BL)
    loss = (tokens.loss_N * rows.weight_BL.flatten()).sum() / rows.num_targets
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "config", [LayoutConfig(), LayoutConfig(alpha=0.9, interpolation="bicubic", feed_last_scale=True)]
)
@pytest.mark.parametrize("changes", [{}, {"head": "dual"}])
def test_packed_equals_one_document_per_row(config, changes):
    model, docs = tiny(**changes), documents()
    alone = lay_out([[document] for document in docs], model.vocabulary, config)
    packed = lay_out([[docs[3], docs[0]], [docs[2], docs[4], docs[1]]], model.vocabulary, config, length=140)
    loss_a, gradient_a = loss_and_gradients(model, alone)
    loss_b, gradient_b = loss_and_gradients(model, packed)
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-5, atol=1e-5)
    largest = max((gradient_a[name] - gradient_b[name]).abs().max().item() for name in gradient_a)
    print(f"packed against alone: loss {abs(loss_a - loss_b):.1e}, largest gradient difference {largest:.1e}")
    assert largest < 1e-5


def test_nothing_sees_what_comes_later_or_another_document():
    model, docs = tiny().double(), documents()
    rows = lay_out([[docs[0], docs[1]]], model.vocabulary, LayoutConfig())
    x_BLW = model.embed(rows).detach().requires_grad_()
    model._inputs = lambda _: x_BLW
    hidden_BLW = model(rows)
    visible_LL = rows.visible_BLL()[0]
    for query in range(0, hidden_BLW.shape[1], 5):
        (gradient_BLW,) = torch.autograd.grad(hidden_BLW[0, query].square().sum(), x_BLW, retain_graph=True)
        assert torch.equal(gradient_BLW[0].abs().sum(-1) > 0, visible_LL[query])


def test_alpha_moves_weight_to_coarse_scales_and_keeps_the_total():
    model, docs = tiny(), documents()[:1]
    flat, tilted = (lay_out([docs], model.vocabulary, LayoutConfig(alpha=alpha)) for alpha in (0.0, 0.9))
    image = flat.scale_BL > 0
    torch.testing.assert_close(flat.weight_BL[image].sum(), tilted.weight_BL[image].sum())
    tokens = model.cross_entropy(model(flat), flat.target_BL)
    by_hand = sum(w * t for w, t in zip(tilted.weight_BL.flatten().tolist(), tokens.loss_N.tolist())) / int(
        tilted.num_targets
    )
    torch.testing.assert_close(loss_and_gradients(model, tilted)[0].item(), by_hand, rtol=1e-5, atol=1e-6)
    coarse = tilted.weight_BL[tilted.scale_BL == 1][0]
    assert coarse > flat.weight_BL[flat.scale_BL == 1][0]


def test_dual_head_lets_text_and_codes_compete_apart():
    model, rows = tiny(head="dual"), None
    rows = lay_out([documents()], model.vocabulary, LayoutConfig())
    hidden_BLW = model(rows)
    tokens = model.cross_entropy(hidden_BLW, rows.target_BL)
    offset = model.vocabulary.code_offset
    logits_NV, target_N = model.logits(hidden_BLW).flatten(0, 1), rows.target_BL.flatten()
    code_N, text_N = target_N >= offset, (target_N >= 0) & (target_N < offset)
    cross_entropy = torch.nn.functional.cross_entropy
    code = cross_entropy(logits_NV[code_N, offset:], target_N[code_N] - offset, reduction="none")
    text = cross_entropy(logits_NV[text_N, :offset], target_N[text_N], reduction="none")
    torch.testing.assert_close(tokens.loss_N[code_N], code)
    torch.testing.assert_close(tokens.loss_N[text_N], text)
    torch.testing.assert_close(
        logits_NV, hidden_BLW.flatten(0, 1) @ torch.cat((model.head.text.weight, model.head.code.weight)).t()
    )


def test_first_code_knows_the_level():
    """<boi> carries the number of scales; without it the 1x1 code of all levels would come from one distribution."""
    model = tiny()
    hidden = [
        model(lay_out([[Document(segments=(ImageSegment(grids=grids, codes=torch.zeros(n, dtype=torch.long)),))]],
                      model.vocabulary, LayoutConfig()))[0, 1]
        for grids, n in ((SQUARE, 30), (SQUARE[:3], 14))
    ]  # fmt: skip
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


def test_last_scales_own_codes_have_a_mark_of_their_own():
    """`feed_last_scale` marks them as scale K + 1, also where K is all that `max_scales` allows."""
    model = tiny(max_scales=len(SQUARE))
    rows = lay_out([[documents()[0]]], model.vocabulary, LayoutConfig(feed_last_scale=True))
    hidden_BLW = model(rows)
    assert int(rows.scale_BL.max()) == len(SQUARE) + 1
    totals = TokenMetrics(len(SQUARE), torch.device("cpu"))
    totals.add(rows, model.cross_entropy(hidden_BLW, rows.target_BL))
    assert int(totals.table_3R[2].sum()) == int(rows.num_targets)
