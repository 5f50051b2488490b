"""Reading transformers out of files: checkpoints of our training modules, and folders of Qwen2.5-VL safetensors.

A checkpoint is one file, or the folder that `ModelParallelStrategy(save_distributed_checkpoint=True)` writes, from any number
of processes. Weights go from it into the transformer row by row: whole or sharded, it is never held twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nextflow.generation.sampling import SamplingConfig
from nextflow.lightning_modules.grpo_objective import ObjectiveConfig
from nextflow.lightning_modules.grpo_rollouts import RolloutConfig
from nextflow.models.transformer.config import DecoderConfig, TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.models.transformer.rows import Rows, copy_rows
from nextflow.models.transformer.state_dict import qwen2_5_vl_rows
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import TextTokenizer

Weights = Literal["trained", "ema"]
"""Which of a checkpoint's weights: those that the optimiser changes, or their moving average (`callbacks/ema.py`)."""

CHECKPOINT_KEY = "nextflow"
"""Where a checkpoint keeps the resolved architecture, schedule, layout, tokenizer fingerprint and text tokenizer."""

_PREFIX = {"trained": "transformer.", "ema": "ema."}
_METADATA = "meta.pt"  # Lightning's name for what is not a tensor of the model or an optimiser

# Hyper-parameters given as objects are pickled as these classes: let Lightning's and our weights-only loading accept them.
torch.serialization.add_safe_globals([DecoderConfig, LayoutConfig, SamplingConfig, ObjectiveConfig, RolloutConfig])


class LoadedTransformer(NamedTuple):
    """A trained transformer and all it needs but the image tokenizer, of which it knows the fingerprint."""

    transformer: Transformer
    schedule: ScaleSchedule
    layout: LayoutConfig
    tokenizer_fingerprint: str
    text_tokenizer: TextTokenizer
    levels: tuple[int, ...]
    """Levels of the pictures that it was trained on."""


def load_transformer(
    checkpoint_path: str | Path, key: str = "transformer", weights: Weights = "trained"
) -> LoadedTransformer:
    """The transformer of a PretrainingModule checkpoint, whole on the CPU, in evaluation mode.

    Args:
        checkpoint_path: a file or folder that Lightning saved.
        key: the configuration key to name in errors.
        weights: which of its weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a checkpoint of a PretrainingModule, or holds no such weights.
    """
    stored, source = _open(Path(checkpoint_path), key, weights)
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig.from_dict(stored["transformer"]))
    transformer.to_empty(device="cpu").init_table()
    source.fill(transformer.state_dict())
    return LoadedTransformer(
        transformer.eval(),
        ScaleSchedule.from_dict(stored["schedule"]),
        LayoutConfig(**stored["layout"]),
        stored["tokenizer"],
        TextTokenizer.from_json(stored["text_tokenizer"]),
        tuple(stored.get("levels", ())),
    )


def initialize(
    transformer: Transformer, path: str | Path, tokenizer_fingerprint: str, weights: Weights = "trained"
) -> tuple[int, ...]:
    """Fill a transformer, sharded or not, with what a stage begins with; all ranks take part.

    Args:
        transformer: with initial weights, which stay where the source has none (Qwen2.5-VL knows no codes).
        path: checkpoint of an earlier stage, or folder of Qwen2.5-VL safetensors.
        tokenizer_fingerprint: the image tokenizer's, which an earlier stage must have been trained with.
        weights: which of an earlier stage's weights.

    Returns:
        The levels of the pictures that the source was trained on: none for Qwen2.5-VL.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another tokenizer, keys or shapes that do not match, or no average where it was asked for.
    """
    path, ours = Path(path), transformer.state_dict()
    if path.is_dir() and not (path / _METADATA).is_file():
        if weights != "trained":
            raise ValueError(f"initialize_weights: 'ema' needs a checkpoint of a PretrainingModule, {path} is none")
        for name, rows in qwen2_5_vl_rows(_safetensors(path), ours, transformer.config).items():
            copy_rows(ours[name], rows)
        return ()
    stored, source = _open(path, "initialize_from", weights)
    if stored["tokenizer"] != tokenizer_fingerprint:
        raise ValueError(
            f"initialize_from: {path} was trained with tokenizer {stored['tokenizer']}, "
            f"but model.tokenizer is {tokenizer_fingerprint}"
        )
    source.fill(ours)
    return tuple(stored.get("levels", ()))


class _Opened(NamedTuple):
    stored: dict[str, Any]
    source: _Source


@dataclass(frozen=True)
class _Source:
    """The weights in a checkpoint: tensors in a file that is mapped into memory, or, without them, a folder of shards."""

    path: Path
    key: str
    prefix: str
    shapes: dict[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor] | None

    def fill(self, ours: dict[str, Tensor]) -> None:
        """Raises ValueError when names or shapes differ."""
        shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
        if shapes != self.shapes:
            differ = sorted(name for name in shapes | self.shapes if shapes.get(name) != self.shapes.get(name))
            name = differ[0]
            raise ValueError(
                f"{self.key}: {self.path} was trained with another architecture: {name} is {self.shapes.get(name)} there "
                f"and {shapes.get(name)} here, {len(differ)} weights differ"
            )
        if self.tensors is not None:
            for name, tensor in ours.items():
                copy_rows(tensor, self.tensors[name])
            return
        from torch.distributed.checkpoint import load

        alone = not any(isinstance(tensor, DTensor) for tensor in ours.values())
        wanted = {self.prefix + name: tensor for name, tensor in ours.items()}
        load({"state_dict": wanted}, checkpoint_id=self.path, no_dist=alone)


def _open(path: Path, key: str, weights: Weights) -> _Opened:
    metadata = path / _METADATA if path.is_dir() else path
    if not metadata.is_file():
        raise FileNotFoundError(f"{key}: {path} does not exist; give the checkpoint of a PretrainingModule")
    checkpoint = torch.load(metadata, map_location="cpu", weights_only=True, mmap=True)
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(f"{key}: {path} is not the checkpoint of a PretrainingModule")
    prefix, tensors = _PREFIX[weights], None
    if path.is_dir():
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        start = f"state_dict.{prefix}"
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
        shapes = {
            name.removeprefix(start): tuple(entry.size)
            for name, entry in entries.items()
            if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
        }
    else:
        state = checkpoint["state_dict"]
        tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if not shapes:
        raise ValueError(f"{key}: {path} holds no {weights!r} weights; the run had no callback EMA")
    return _Opened(checkpoint[CHECKPOINT_KEY], _Source(path, key, prefix, shapes, tensors))


@dataclass(frozen=True)
class _StoredRows:
    """A tensor in a safetensors file, opened for each piece: what was read does not stay mapped."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[rows]


def _safetensors(folder: Path) -> dict[str, Rows]:
    from safetensors import safe_open

    found: dict[str, Rows] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: _StoredRows(path, name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    if not found:
        raise FileNotFoundError(f"initialize_from: no *.safetensors and no checkpoint in {folder}")
    return found
