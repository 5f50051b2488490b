"""The three training stages (NextFlow section 3.1: pixel -> joint -> decoder): what each builds, trains, and starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from nextflow.models.tokenizer.config import TRAINING_ONLY, TokenizerConfig
from nextflow.models.tokenizer.growth import grow_decoder
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.semantic import load_tower, read_semantic_config

Stage = Literal["pixel", "joint", "decoder"]

# Configuration that may differ between a stage and the one before: it changes neither the weights' shapes nor what is stored.
_FREE = {"semantic_weight", "pixel_weight", "schedule", *TRAINING_ONLY} - {"codebook_update"}


def stage_config(config: TokenizerConfig, stage: Stage, semantic_encoder: str | None) -> TokenizerConfig:
    """The architecture of a stage: no semantic branch in `pixel`; else the tower's sizes are those of `semantic_encoder`.

    A folder that is not there leaves the sizes of `config`: whoever needs its weights will say so.
    """
    if stage == "pixel":
        return replace(config, semantic=None)
    if config.semantic is None or semantic_encoder is None or not Path(semantic_encoder).is_dir():
        return config
    return replace(config, semantic=read_semantic_config(semantic_encoder, config.semantic, config.schedule.stride))


def frozen_parts(tokenizer: Tokenizer, stage: Stage, *, encoder_trains: bool, semantic_loss: bool) -> list[nn.Module]:
    """Modules that a stage does not train: they get no gradient and stay in evaluation mode.

    Args:
        tokenizer: the tokenizer.
        stage: `decoder` freezes everything but the pixel decoder, the quantiser's statistics included.
        encoder_trains: whether the tower of the semantic encoder trains in `joint`; its projection always does.
        semantic_loss: whether anything reads the semantic decoder.
    """
    if stage == "decoder":
        return [part for name, part in tokenizer.named_children() if name != "pixel_decoder"]
    if tokenizer.config.semantic is None:
        return []
    parts: list[nn.Module] = [] if encoder_trains else [tokenizer.semantic_encoder.tower]
    return parts if semantic_loss else [*parts, tokenizer.semantic_decoder]


def start_stage(
    tokenizer: Tokenizer, stage: Stage, source: Tokenizer | None, semantic_encoder: str | None = None
) -> None:
    """First weights of a stage: the tower's from its folder, then those of the stage before.

    Args:
        tokenizer: the tokenizer to fill.
        stage: the stage that it is about to train in.
        source: the tokenizer of the stage before; None starts from nothing, which `decoder` refuses.
        semantic_encoder: folder of a SigLIP 2 model.

    Raises ValueError or FileNotFoundError, naming the keys, where something does not fit or is missing.
    """
    if stage == "decoder" and source is None:
        raise ValueError("stage decoder needs `init_from`, the checkpoint of the joint stage")
    if stage == "joint" and tokenizer.config.semantic is not None and semantic_encoder is not None:
        load_tower(tokenizer.semantic_encoder.tower, semantic_encoder)
    if source is not None:
        {"pixel": start_pixel, "joint": start_joint, "decoder": start_decoder}[stage](tokenizer, source)


def start_pixel(tokenizer: Tokenizer, pixel_stage: Tokenizer) -> None:
    """Everything comes from another pixel stage. Raises ValueError, naming the keys, where the two do not fit."""
    _check(tokenizer, pixel_stage, _FREE)
    tokenizer.load_state_dict(pixel_stage.state_dict())


@torch.no_grad()
def start_joint(tokenizer: Tokenizer, pixel_stage: Tokenizer) -> None:
    """Pixel encoder, decoder and codebook come from the pixel stage; semantic entries follow with the first batch.

    From a stage that has a semantic branch (joint or decoder) everything comes: fine-tuning on other data.

    Raises ValueError, naming the keys, where the two do not fit.
    """
    if pixel_stage.config.semantic is not None:
        _check(tokenizer, pixel_stage, _FREE)
        tokenizer.load_state_dict(pixel_stage.state_dict())
        return
    _check(tokenizer, pixel_stage, _FREE | {"semantic", "semantic_dim", "codebook_update"})
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


def check_resumed(config: TokenizerConfig, stored: dict) -> None:
    """A checkpoint to go on with, or to evaluate, must hold the architecture that the config states.

    Raises ValueError, naming the keys. What changes no weight's shape may differ.
    """
    _check_same(config.to_dict(), TokenizerConfig.from_dict(stored).to_dict(), _FREE, "--ckpt_path")


def _check(tokenizer: Tokenizer, source: Tokenizer, free: set[str]) -> None:
    _check_same(tokenizer.config.to_dict(), source.config.to_dict(), free, "init_from")


def _check_same(ours: dict, theirs: dict, free: set[str], where: str) -> None:
    wrong = [key for key in ours if key not in free and ours[key] != theirs[key]]
    if wrong:
        differences = ", ".join(f"tokenizer.{key}: {ours[key]} here, {theirs[key]} there" for key in wrong)
        raise ValueError(f"{where} holds a tokenizer of another configuration; {differences}")
