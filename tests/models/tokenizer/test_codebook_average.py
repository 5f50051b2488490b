"""Running means of codebook entries == a plain loop with running sums and counts."""

from dataclasses import replace

import pytest
import torch

from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer
from nextflow.models.tokenizer.stages import start_stage
from nextflow.sequence.scales import ScaleSchedule

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


def test_an_interrupted_run_continues_as_a_straight_one():
    options = {"revive_interval": 2, "revive_below": 0.5, "usage_decay": 0.5}
    straight, first, second = (_quantizer(**options) for _ in range(3))
    for step in range(6):
        straight(_features(step), GRIDS)
    for step in range(3):
        first(_features(step), GRIDS)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        second(_features(step), GRIDS)
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


CONFIG = TokenizerConfig(
    schedule=ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8),
    codebook_size=16,
    semantic_dim=4,
    pixel_dim=2,
    pixel=PixelConfig(layout="patchified", width=4, multipliers=(1, 1), num_blocks=1, stem=4, latent_width=4, groups=2),
    semantic=SemanticConfig(
        width=8,
        mlp_width=8,
        num_layers=1,
        num_heads=2,
        num_patches=4,
        decoder_layers=1,
        decoder_width=8,
        decoder_heads=2,
    ),
)


def test_how_entries_move_is_no_part_of_the_fingerprint():
    gradient = Tokenizer(CONFIG)
    ema = Tokenizer(replace(CONFIG, codebook_update="ema", ema_decay=0.5, entropy_temperature=1.0, usage_decay=0.5))
    ema.load_state_dict(gradient.state_dict() | {"quantizer.average.weight_K": torch.zeros(16)})
    assert ema.fingerprint() == gradient.fingerprint()


def test_stages_may_change_it_with_the_new_semantic_entries_only():
    pixel = Tokenizer(replace(CONFIG, semantic=None))
    joint = Tokenizer(replace(CONFIG, codebook_update="ema"))
    start_stage(joint, "joint", pixel)
    assert torch.equal(joint.quantizer.pixel_codebook, pixel.quantizer.pixel_codebook)
    assert (joint.quantizer.average.weight_K == 1).all()  # entries that were trained have a past
    with pytest.raises(ValueError, match=r"tokenizer.codebook_update: gradient here, ema there"):
        start_stage(Tokenizer(CONFIG), "decoder", joint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_update": "adam"}, "codebook_update"),
        ({"ema_decay": 1.0}, "ema_decay 1.0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature"),
    ],
)
def test_errors_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)
