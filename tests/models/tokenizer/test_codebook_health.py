"""A codebook starts from data, revives dead entries, and does so as a function of the step alone."""

import torch
import torch.nn.functional as F

from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer

GRIDS = ((1, 1), (2, 2), (4, 4))


def _features(seed=0):
    return torch.randn(16, 6, 4, 4, generator=torch.Generator().manual_seed(seed)) + 5.0


def _quantizer(semantic_dim=4, **options):
    torch.manual_seed(0)
    return DualCodebookQuantizer(64, semantic_dim, 6 - semantic_dim, **options)


def test_first_training_batch_gives_the_entries():
    random, trained = _quantizer().eval(), _quantizer().train()
    from_random = random(_features(), GRIDS)
    from_data = trained(_features(), GRIDS)
    assert from_data.codebook_loss < 0.5 * from_random.codebook_loss
    assert len(from_data.indices.unique()) > 48


def test_evaluation_changes_nothing():
    quantizer = _quantizer(revive_interval=1).train()
    quantizer(_features(), GRIDS)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()(_features(1), GRIDS)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_a_pixel_codebook_of_an_earlier_stage_is_kept():
    quantizer = _quantizer().train()
    pixel = quantizer.pixel_codebook.detach().clone()
    quantizer.health.pixel_ready.fill_(True)
    semantic = quantizer.semantic_codebook.detach().clone()
    quantizer(_features(), GRIDS)
    assert torch.equal(quantizer.pixel_codebook, pixel)
    assert not torch.equal(quantizer.semantic_codebook, semantic)
    torch.testing.assert_close(quantizer.semantic_codebook.norm(dim=1), torch.ones(64))
    assert bool(quantizer.health.semantic_ready)


def test_dead_entries_move_to_features_and_live_ones_stay():
    quantizer = _quantizer(revive_interval=5, revive_below=0.5, usage_decay=0.5).train()
    quantizer(_features(), GRIDS)
    with torch.no_grad():  # no residual points this way in both parts at once
        quantizer.semantic_codebook[:10] = torch.tensor([-1.0, 0, 0, 0])
        quantizer.pixel_codebook[:10] = torch.tensor([0.0, -1.0])
        quantizer.semantic_weight = 100.0
    for _ in range(4):
        quantizer(_features(), GRIDS)
    dead = quantizer.health.usage_K < 0.5
    before = quantizer.entries_KC().detach().clone()
    quantizer(_features(), GRIDS)
    moved = (quantizer.entries_KC() != before).any(dim=1)
    assert torch.equal(moved, dead) and 0 < dead.sum() < 64


def test_draws_are_a_function_of_the_step():
    first, second = _quantizer(revive_interval=2).train(), _quantizer(revive_interval=2).train()
    for seed in range(5):
        torch.manual_seed(seed)
        first(_features(seed), GRIDS)
    for seed in range(5):
        torch.manual_seed(100 + seed)
        second(_features(seed), GRIDS)
    assert torch.equal(first.pixel_codebook, second.pixel_codebook)
    torch.testing.assert_close(F.normalize(first.pixel_codebook, dim=1), first.pixel_codebook)
