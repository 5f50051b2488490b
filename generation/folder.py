"""A trained system as a folder in the layout of the Hugging Face hub: everything that generation needs, nothing of training.

    README.md                    model card
    config.json                  architecture, layout, sampling defaults, fingerprints
    model.safetensors            transformer; in parts with an index above 5 GB
    image_tokenizer/             config.json (with the scale schedule), model.safetensors
    text_tokenizer/              a Hugging Face tokenizer

`generation.pipeline.NextFlowPipeline` writes and reads it. No lightning, no pickle.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from nextflow.generation.sampling import Guidance, SamplingConfig
from nextflow.models.tokenizer.config import TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.text_tokenizer import TextTokenizer, load_text_tokenizer

FORMAT = 1
"""Version of the folder; a later one is refused."""
CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZER = "config.json", "image_tokenizer", "text_tokenizer"


class System(NamedTuple):
    """What a folder holds."""

    transformer: Transformer
    tokenizer: Tokenizer
    text_tokenizer: TextTokenizer
    layout: LayoutConfig
    sampling: SamplingConfig
    guidance: Guidance
    levels: tuple[int, ...]
    """Levels of the pictures that it was trained on; empty where that is not known."""


def write_folder(system: System, folder: str | Path) -> None:
    """Write `folder`, which may exist; config.json comes last, so that a folder with one is complete."""
    folder = Path(folder)
    (folder / CONFIG).unlink(missing_ok=True)
    _write_weights(system.transformer, folder)
    _write_weights(system.tokenizer, folder / IMAGE_TOKENIZER)
    _write_json(folder / IMAGE_TOKENIZER / CONFIG, system.tokenizer.config.to_dict())
    system.text_tokenizer.save_pretrained(folder / TEXT_TOKENIZER)
    config = {
        "model_type": "nextflow",
        "format": FORMAT,
        "transformer": system.transformer.config.to_dict(),
        "layout": asdict(system.layout),
        "sampling": asdict(system.sampling),
        "guidance": system.guidance,
        "levels": system.levels,
        "fingerprints": {
            "image_tokenizer": system.tokenizer.fingerprint(),
            "text_tokenizer": system.text_tokenizer.fingerprint(),
            "schedule": system.tokenizer.schedule.fingerprint(),
        },
    }
    (folder / "README.md").write_text(_card(system), encoding="utf-8")
    _write_json(folder / CONFIG, config)


def read_folder(folder: str | Path, dtype: torch.dtype = torch.float32) -> System:
    """Read a folder of `write_folder`, on the CPU, in evaluation mode and without gradients; never downloads.

    Args:
        folder: the folder.
        dtype: of the transformer; the image tokenizer is always float32, so that its codes do not change.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: it is of a later format, its weights do not match its config, or a tokenizer is not the one it was trained
            with.
    """
    folder = Path(folder)
    config = _read_json(folder)
    if config.get("model_type") != "nextflow" or config.get("format", FORMAT + 1) > FORMAT:
        raise ValueError(
            f"{folder / CONFIG} is of type {config.get('model_type')!r}, format {config.get('format')}; this version reads "
            f"'nextflow' up to format {FORMAT}: update it, or name a folder that `main.py export` wrote"
        )
    with torch.device("meta"):  # drawing random weights takes longer than reading the real ones
        transformer = Transformer(TransformerConfig.from_dict(config["transformer"])).to(dtype)
        tokenizer = Tokenizer(TokenizerConfig.from_dict(_read_json(folder / IMAGE_TOKENIZER)))
    _read_weights(transformer, folder)
    transformer.init_table()
    _read_weights(tokenizer, folder / IMAGE_TOKENIZER)
    text_tokenizer = load_text_tokenizer(folder / TEXT_TOKENIZER)
    for name, actual in (
        ("image_tokenizer", tokenizer.fingerprint()),
        ("text_tokenizer", text_tokenizer.fingerprint()),
        ("schedule", tokenizer.schedule.fingerprint()),
    ):
        if actual != config["fingerprints"][name]:
            raise ValueError(
                f"{folder}: the transformer was trained with {name} {config['fingerprints'][name]}, "
                f"but the folder holds {actual}: put the original back, or export the checkpoint again"
            )
    guidance = config["guidance"]
    return System(
        transformer.requires_grad_(False).eval(),
        tokenizer.requires_grad_(False).eval(),
        text_tokenizer,
        LayoutConfig(**config["layout"]),
        SamplingConfig(**config["sampling"]),
        tuple(guidance) if isinstance(guidance, list) else guidance,
        tuple(config.get("levels", ())),
    )


def _write_weights(module: nn.Module, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(module.state_dict(), folder, metadata={"format": "pt"})


@torch.no_grad()
def _read_weights(module: nn.Module, folder: Path) -> None:
    """Give a module on the meta device memory and fill it one tensor at a time, so that nothing is held twice."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no model*.safetensors in {folder}: the folder is not complete")
    missing = dict(module.to_empty(device="cpu").state_dict())
    for path in files:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                target = missing.pop(name, None)
                shape = tuple(stored.get_slice(name).get_shape())
                if target is None or tuple(target.shape) != shape:
                    expected = "nothing of that name" if target is None else f"shape {tuple(target.shape)}"
                    raise ValueError(f"{path}: {name} has shape {shape}; {CONFIG} asks for {expected}")
                target.copy_(stored.get_tensor(name))
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(sorted(missing)[:3])} ({len(missing)} weights)")


def _read_json(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"there is no {folder / CONFIG}: name a folder that `main.py export` wrote")
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _card(system: System) -> str:
    config, schedule = system.transformer.config, system.tokenizer.schedule
    parameters = sum(parameter.numel() for parameter in system.transformer.parameters())
    trained = system.levels or tuple(schedule.levels)
    levels = ", ".join(f"{level} ({schedule.num_scales(level)} scales)" for level in trained)
    return f"""---
library_name: nextflow
pipeline_tag: any-to-any
tags: [text-to-image, image-to-text, image-editing, interleaved, next-scale-prediction]
---

# NextFlow, {parameters / 1e6:.1f}M parameters

One decoder-only transformer that reads and writes texts and pictures: texts by next token, pictures by next scale.

    from nextflow.generation.pipeline import NextFlowPipeline

    pipeline = NextFlowPipeline.from_pretrained("this folder")
    pipeline.generate("a red apple")[0].image.save("apple.png")

| | |
| --- | --- |
| transformer | {config.num_layers} layers, width {config.width}, {config.num_heads} query and {config.num_kv_heads} key heads |
| vocabulary | {config.text_size:,} text ids, {config.codebook_size:,} codes |
| levels | {levels} |
| aspect ratios | {len(schedule.base_grids)}, {min(h / w for h, w in schedule.base_grids):.2g} to \
{max(h / w for h, w in schedule.base_grids):.2g} (height / width) |
| image tokenizer | {system.tokenizer.fingerprint()} |

Weights are safetensors; nothing in this folder is executed. Add what it was trained on, its licence and its limits here.
"""
