"""The chunked entropy loss == its formula, value and gradients; what it rewards."""

import math

import pytest
import torch
import torch.nn.functional as F

from nextflow.models.tokenizer import entropy
from nextflow.models.tokenizer.entropy import entropy_loss
from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer


def _by_the_formula(vectors, entries, temperature):
    distance = (vectors[:, None] - entries).square().sum(-1)
    choice = torch.softmax(-distance / temperature, dim=1)
    return torch.special.entr(choice).sum(1).mean() - torch.special.entr(choice.mean(0)).sum()


@pytest.mark.parametrize("chunk", [7, 100, 1 << 20])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_equals_the_formula(monkeypatch, chunk, temperature):
    monkeypatch.setattr(entropy, "CHUNK_ELEMENTS", chunk)
    vectors = F.normalize(torch.randn(37, 5), dim=1).requires_grad_()
    entries = F.normalize(torch.randn(11, 5), dim=1).requires_grad_()
    ours = entropy_loss(vectors, entries, temperature)
    gradients = torch.autograd.grad(3 * ours, (vectors, entries))
    double = [tensor.detach().double().requires_grad_() for tensor in (vectors, entries)]
    theirs = _by_the_formula(*double, temperature)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    for gradient, expected in zip(gradients, torch.autograd.grad(3 * theirs, double)):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-5)


def test_sure_and_even_choices_are_best():
    entries = torch.eye(8)
    assert entropy_loss(entries, entries, 0.01) == pytest.approx(-math.log(8), abs=1e-4)  # sure and even
    assert entropy_loss(entries[:1].expand(8, -1), entries, 0.01) == pytest.approx(0, abs=1e-4)  # all alike
    assert entropy_loss(torch.zeros(8, 8), entries, 0.01) == pytest.approx(0, abs=1e-4)  # all undecided


@pytest.mark.parametrize("dropped", [False, True])
def test_the_quantiser_reads_all_vectors_of_the_used_scales_with_the_weights_of_the_search(dropped):
    quantizer = DualCodebookQuantizer(20, 4, 3, semantic_weight=0.5, pixel_weight=2.0, entropy_temperature=0.3).eval()
    features, grids, keep = torch.randn(2, 7, 4, 4), ((1, 1), (2, 2), (4, 4)), [True, not dropped, True]
    assert quantizer(features, grids, keep).entropy_loss is None
    output = quantizer(features, grids, keep, entropy=True)
    scale = torch.tensor([0.5] * 4 + [2.0] * 3).sqrt()
    vectors = torch.cat([step.vectors_NC for _, step in quantizer.scales(features, grids, keep) if step is not None])
    expected = _by_the_formula(vectors * scale, quantizer.entries_KC() * scale, 0.3)
    torch.testing.assert_close(output.entropy_loss, expected, rtol=1e-4, atol=1e-5)
    output.entropy_loss.backward()
    assert quantizer.semantic_codebook.grad.abs().sum() > 0 and quantizer.pixel_codebook.grad.abs().sum() > 0
