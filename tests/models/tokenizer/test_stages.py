"""Fine-tuning: stage joint takes over all of a tokenizer that has a semantic branch, or refuses one that does not fit."""

from dataclasses import replace

import pytest
import torch

from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.stages import check_resumed, start_stage
from nextflow.sequence.scales import ScaleSchedule

SEMANTIC = SemanticConfig(
    width=16,
    mlp_width=32,
    num_layers=1,
    num_heads=2,
    num_patches=16,
    decoder_layers=1,
    decoder_width=16,
    decoder_heads=2,
)
CONFIG = TokenizerConfig(
    schedule=ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8),
    codebook_size=32,
    semantic_dim=8,
    pixel_dim=4,
    semantic=SEMANTIC,
    pixel=PixelConfig(
        layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4
    ),
)


@pytest.mark.parametrize("capacity", [1, 2])
def test_joint_takes_over_a_joint_or_decoder_stage_whole(capacity):
    trained, fresh = (Tokenizer(replace(CONFIG, decoder_capacity=capacity)) for _ in range(2))
    trained.quantizer.health.pixel_ready.fill_(True)
    assert trained.fingerprint() != fresh.fingerprint()
    start_stage(fresh, "joint", trained)
    theirs = trained.state_dict()
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True, msg=name)
    with torch.no_grad():  # a copy, not the same tensors
        fresh.quantizer.pixel_codebook.add_(1)
    assert not torch.equal(fresh.quantizer.pixel_codebook, trained.quantizer.pixel_codebook)


@pytest.mark.parametrize(
    "change", [{"codebook_size": 16}, {"decoder_capacity": 2}, {"semantic": replace(SEMANTIC, decoder_layers=2)}]
)
def test_another_architecture_is_refused_by_its_key(change):
    (key,) = change
    with pytest.raises(ValueError, match=rf"init_from.*tokenizer\.{key}: .* here, .* there"):
        start_stage(Tokenizer(replace(CONFIG, **change)), "joint", Tokenizer(CONFIG))


def test_a_checkpoint_of_another_architecture_is_refused_by_its_key():
    check_resumed(CONFIG, replace(CONFIG, revive_interval=7).to_dict())
    with pytest.raises(ValueError, match=r"--ckpt_path.*tokenizer\.codebook_size: 32 here, 64 there"):
        check_resumed(CONFIG, replace(CONFIG, codebook_size=64).to_dict())
