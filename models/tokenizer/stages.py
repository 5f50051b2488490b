"""What one training stage hands to the next (NextFlow section 3.1: pixel -> joint -> decoder)."""

from __future__ import annotations

import torch

from nextflow.models.tokenizer.growth import grow_decoder
from nextflow.models.tokenizer.model import Tokenizer

# Configuration that may differ between a stage and the one before: it changes no weight's shape.
_FREE = {"semantic_weight", "pixel_weight", "beta", "revive_interval", "revive_below", "usage_decay", "schedule"}


@torch.no_grad()
def start_joint(tokenizer: Tokenizer, pixel_stage: Tokenizer) -> None:
    """Pixel encoder, decoder and codebook come from the pixel stage; semantic entries follow with the first batch.

    Raises ValueError, naming the keys, where the two do not fit.
    """
    if pixel_stage.config.semantic is not None:
        raise ValueError(
            "init_from: stage joint starts from a pixel stage, but this checkpoint has a semantic branch; "
            "continue a joint run with --ckpt_path"
        )
    _check(tokenizer, pixel_stage, _FREE | {"semantic", "semantic_dim"})
    tokenizer.pixel_encoder.load_state_dict(pixel_stage.pixel_encoder.state_dict())
    tokenizer.pixel_decoder.load_state_dict(pixel_stage.pixel_decoder.state_dict())
    tokenizer.quantizer.pixel_codebook.copy_(pixel_stage.quantizer.pixel_codebook)
    tokenizer.quantizer.health.usage_K.copy_(pixel_stage.quantizer.health.usage_K)
    tokenizer.quantizer.health.pixel_ready.fill_(True)


@torch.no_grad()
def start_decoder(tokenizer: Tokenizer, joint_stage: Tokenizer) -> None:
    """Everything comes from the joint stage; `decoder_capacity` 2 doubles the pixel decoder, which computes the same at first.

    Raises ValueError, naming the keys, where the two do not fit.
    """
    _check(tokenizer, joint_stage, _FREE | {"decoder_capacity"})
    grows = tokenizer.config.decoder_capacity > joint_stage.config.decoder_capacity
    state = joint_stage.state_dict()
    if grows:  # the larger decoder has keys of its own, which grow_decoder fills
        state = {key: value for key, value in state.items() if not key.startswith("pixel_decoder.")}
        state |= {key: value for key, value in tokenizer.state_dict().items() if key.startswith("pixel_decoder.")}
    tokenizer.load_state_dict(state)
    if grows:
        grow_decoder(joint_stage.pixel_decoder, tokenizer.pixel_decoder)


def _check(tokenizer: Tokenizer, source: Tokenizer, free: set[str]) -> None:
    ours, theirs = tokenizer.config.to_dict(), source.config.to_dict()
    wrong = [key for key in ours if key not in free and ours[key] != theirs[key]]
    if wrong:
        differences = ", ".join(f"tokenizer.{key}: {ours[key]} here, {theirs[key]} there" for key in wrong)
        raise ValueError(f"init_from holds a tokenizer of another configuration; {differences}")
