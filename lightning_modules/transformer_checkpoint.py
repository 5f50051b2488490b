"""Reading transformers out of files: checkpoints of our training modules, and folders of Qwen2.5-VL safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextflow.generation.sampling import SamplingConfig
from nextflow.models.transformer.config import DecoderConfig, TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.models.transformer.state_dict import from_qwen2_5_vl
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import TextTokenizer

CHECKPOINT_KEY = "nextflow"
"""Where a checkpoint keeps the resolved architecture, schedule, layout, tokenizer fingerprint and text tokenizer."""

_PREFIX = "transformer."

# Hyper-parameters given as objects are pickled as these classes: let Lightning's and our weights-only loading accept them.
torch.serialization.add_safe_globals([DecoderConfig, LayoutConfig, SamplingConfig])


class LoadedTransformer(NamedTuple):
    """A trained transformer and all it needs but the image tokenizer, of which it knows the fingerprint."""

    transformer: Transformer
    schedule: ScaleSchedule
    layout: LayoutConfig
    tokenizer_fingerprint: str
    text_tokenizer: TextTokenizer


def load_transformer(checkpoint_path: str | Path, key: str = "transformer") -> LoadedTransformer:
    """The transformer of a PretrainingModule checkpoint, in evaluation mode.

    Args:
        checkpoint_path: a checkpoint that Lightning saved as one file.
        key: the configuration key to name in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint of a PretrainingModule.
    """
    checkpoint = _read(Path(checkpoint_path), key)
    stored = checkpoint[CHECKPOINT_KEY]
    transformer = Transformer(TransformerConfig.from_dict(stored["transformer"]))
    transformer.load_state_dict(_weights(checkpoint))
    return LoadedTransformer(
        transformer.eval(),
        ScaleSchedule.from_dict(stored["schedule"]),
        LayoutConfig(**stored["layout"]),
        stored["tokenizer"],
        TextTokenizer.from_json(stored["text_tokenizer"]),
    )


def initial_weights(path: str | Path, transformer: Transformer, tokenizer_fingerprint: str) -> dict[str, Tensor]:
    """Weights to begin a stage with: those of an earlier stage's checkpoint, or of a folder of Qwen2.5-VL safetensors.

    Raises ValueError when the checkpoint was trained with another image tokenizer, or keys do not match.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"initialize_from: no *.safetensors in {path}")
        from safetensors.torch import load_file

        theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return from_qwen2_5_vl(theirs, transformer.state_dict(), transformer.config)
    checkpoint = _read(path, "initialize_from")
    if checkpoint[CHECKPOINT_KEY]["tokenizer"] != tokenizer_fingerprint:
        raise ValueError(
            f"initialize_from: {path} was trained with tokenizer {checkpoint[CHECKPOINT_KEY]['tokenizer']}, "
            f"but model.tokenizer is {tokenizer_fingerprint}"
        )
    return _weights(checkpoint)


def _read(path: Path, key: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{key}: {path} does not exist; give the checkpoint of a PretrainingModule")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(f"{key}: {path} is not the checkpoint of a PretrainingModule")
    return checkpoint


def _weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    state = checkpoint["state_dict"]
    return {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
