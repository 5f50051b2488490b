"""What has to agree for a transformer to train or answer: the data, the checkpoint, the tokenizers, layout and levels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from nextflow.lightning_modules.transformer_checkpoint import CHECKPOINT_KEY
from nextflow.sequence.flops import DecoderShape
from nextflow.sequence.image_layout import LayoutConfig


def check_data(module: Any, data: Any) -> None:
    """Refuse data that was laid out for another vocabulary, schedule, layout or shape; alpha is the data's own.

    Args:
        module: a PretrainingModule.
        data: a DataModule, of which the attributes that exist are compared, or None.

    Raises ValueError naming both sides.
    """
    plain = {"text_tokenizer": lambda value: value.fingerprint(), "layout": lambda value: replace(value, alpha=0.0)}
    for name, ours in (
        ("text_tokenizer", module.text_tokenizer),
        ("schedule", module.schedule),
        ("codebook_size", module.config.codebook_size),
        ("layout", module.layout),
        ("transformer", DecoderShape.of(module.config)),  # only packing by budget asks the data for it
    ):
        compared = plain.get(name, lambda value: value)
        theirs = getattr(data, name, None)
        theirs, ours = compared(ours if theirs is None else theirs), compared(ours)
        if theirs != ours:
            raise ValueError(f"data.{name} and the model's differ: {theirs} and {ours}")


def describe(module: Any, fingerprint: str) -> dict[str, Any]:
    """Everything that was resolved, as a checkpoint keeps it to explain itself.

    Args:
        module: a PretrainingModule.
        fingerprint: of its image tokenizer.
    """
    return {
        "transformer": module.config.to_dict(),
        "schedule": module.schedule.to_dict(),
        "layout": asdict(module.layout),
        "tokenizer": fingerprint,
        "text_tokenizer": module.text_tokenizer.to_json(),
        "levels": sorted(module.trained_levels),
        "ema": module.ema is not None,
    }


def check_levels(module: Any, prompts: Iterable[Any]) -> None:
    """Refuse to draw at a level that no stage has trained: its scales are as they were initialised.

    Args:
        module: a PretrainingModule; one that was never trained draws at any level.
        prompts: of a PromptBatch.

    Raises ValueError naming the level and those that there are.
    """
    trained = module.trained_levels
    wrong = sorted({prompt.level for prompt in prompts if prompt.task != "text"} - trained) if trained else []
    if wrong:
        raise ValueError(
            f"data.level: pictures of level {wrong[0]} are asked for, but the checkpoint was trained at level "
            f"{', '.join(map(str, sorted(trained)))} alone: ask for one of these, or train it at level {wrong[0]}"
        )


def check_checkpoint(module: Any, fingerprint: str, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another kind of model, of other tokenizers, layout or sizes; alpha is the data's own.

    Raises ValueError naming both sides.
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            "the checkpoint that was given (`ckpt_path`) is not one of a PretrainingModule; those of tokenizers belong in "
            "model.tokenizer"
        )
    stored = checkpoint[CHECKPOINT_KEY]
    if stored["tokenizer"] != fingerprint:
        raise ValueError(
            f"the checkpoint was trained with tokenizer {stored['tokenizer']}, but model.tokenizer "
            f"({module.tokenizer_path}) is {fingerprint}: name the tokenizer it was trained with"
        )
    if stored["text_tokenizer"] != module.text_tokenizer.to_json():
        raise ValueError(
            f"the checkpoint was trained with another text tokenizer than model.text_tokenizer "
            f"({module.text_tokenizer_path}): name the folder it was trained with"
        )
    layout = replace(LayoutConfig(**stored["layout"]), alpha=module.layout.alpha)
    if layout != module.layout:
        raise ValueError(f"the checkpoint was trained with {layout}, but model.layout is {module.layout}")
    theirs, ours = stored["transformer"], module.config.to_dict()
    differ = [name for name in ours if name in theirs and theirs[name] != ours[name] and name != "init_std"]
    if differ:
        sizes = ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in differ)
        raise ValueError(f"the checkpoint was trained with another model.transformer than the config's: {sizes}")
