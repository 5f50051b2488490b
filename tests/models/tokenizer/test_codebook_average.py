"""Running means of codebook entries == a plain loop with running sums and counts."""

import pytest
import torch

from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer

GRIDS = ((1, 1), (2, 2), (4, 4))
ENTRIES, SEMANTIC, PIXEL, DECAY = 40, 4, 2, 0.9


def _quantizer(**options) -> DualCodebookQuantizer:
    torch.manual_seed(0)
    options = {"codebook_update": "ema", "ema_decay": DECAY, **options}
    return DualCodebookQuantizer(ENTRIES, SEMANTIC, PIXEL, **options).train()


def _features(step):
    return torch.randn(6, SEMANTIC + PIXEL, 4, 4, generator=torch.Generator().manual_seed(step)) + 1.0


def _entries(quantizer):
    return torch.cat([quantizer.semantic_codebook, quantizer.pixel_codebook], dim=1).detach().clone()


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_running_sums_over_running_counts(normalize):
    quantizer = _quantizer(normalize=normalize)
    quantizer.health.pixel_ready.fill_(True)
    quantizer.health.semantic_ready.fill_(True)  # entries that exist count as one vector
    entries = _entries(quantizer).double()
    sums, counts = entries.clone(), torch.ones(ENTRIES, dtype=torch.float64)
    for step in range(6):
        keep = [True, step % 2 == 0, True]
        features = _features(step)
        steps = [taken for _, taken in quantizer.scales(features, GRIDS, keep) if taken is not None]
        quantizer(features, GRIDS, keep)
        sums, counts = DECAY * sums, DECAY * counts
        for taken in steps:
            for vector, code in zip(taken.vectors_NC.double(), taken.target_BN.flatten().tolist()):
                sums[code] += (1 - DECAY) * vector
                counts[code] += 1 - DECAY
        used = torch.cat([taken.target_BN.flatten() for taken in steps]).unique()
        entries[used] = sums[used] / counts[used, None]
        torch.testing.assert_close(_entries(quantizer).double(), entries, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quantizer.average.weight_K.double(), counts, rtol=1e-4, atol=1e-6)


def test_entries_from_data_and_revived_ones_start_without_a_past():
    """They move to the mean of the vectors of their first step."""
    quantizer = _quantizer(revive_interval=3, revive_below=0.5, usage_decay=0.5)
    for step in range(4):  # first entries in step 0, revival in step 3
        dead = quantizer.health.usage_K < 0.5
        output = quantizer(_features(step), GRIDS)
        if step in (0, 3):
            new = dead if step else torch.ones(ENTRIES, dtype=torch.bool)
            counts = torch.bincount(output.indices.flatten(), minlength=ENTRIES)
            assert new.any() and (counts[new] > 0).any()
            torch.testing.assert_close(quantizer.average.weight_K[new], (1 - DECAY) * counts[new].float())


def test_codebooks_need_no_gradient_and_the_codebook_loss_is_zero():
    quantizer = _quantizer()
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    features = _features(0).requires_grad_()
    output = quantizer(features, GRIDS)
    assert output.codebook_loss == 0 and not output.codebook_loss.requires_grad
    (output.codebook_loss + output.commitment_loss).backward()
    assert features.grad.abs().sum() > 0


def test_errors_fall_without_any_optimiser():
    quantizer = _quantizer(revive_interval=5, revive_below=0.2, usage_decay=0.9)
    losses = [quantizer(_features(step % 4), GRIDS).commitment_loss.item() for step in range(60)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[1:5])


def test_evaluation_and_a_frozen_quantiser_leave_entries_alone():
    quantizer = _quantizer()
    quantizer(_features(0), GRIDS)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.eval()(_features(1), GRIDS)
    assert "average.weight_K" in before
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
