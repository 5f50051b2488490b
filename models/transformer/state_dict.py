"""Qwen2.5-VL weights of Hugging Face to ours and back, text tower only (paper 3.2.2: the ViT gives way to the image tokenizer).

Two styles of keys are in circulation: `model.language_model.layers.0...` (transformers 5) and `model.layers.0...` (checkpoints
published in 2025). The visual tower (`model.visual.*`, `visual.*`) is dropped. Anything else that does not match is an error.

    ours                                        Hugging Face's
    token_embedding.weight                      embed_tokens.weight
    blocks.N.attention.qkv_proj.{weight,bias}   layers.N.self_attn.{q,k,v}_proj.{weight,bias}, stacked
    blocks.N.attention.o_proj.weight            layers.N.self_attn.o_proj.weight
    blocks.N.mlp.gate_up_proj.weight            layers.N.mlp.{gate,up}_proj.weight, stacked
    blocks.N.mlp.down_proj.weight               layers.N.mlp.down_proj.weight
    blocks.N.{attention,mlp}_norm.weight        layers.N.{input,post_attention}_layernorm.weight
    norm.weight                                 norm.weight
    head.weight (head.text.weight), text rows   lm_head.weight
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.rows import Rows

OURS_ALONE = ("boundary_embedding.", "code_embedding.", "connector.", "scale_embedding.", "head.code.")


@dataclass(frozen=True)
class Stacked:
    """Tensors of theirs on top of each other, of which the first rows count; read piece by piece."""

    parts: tuple[Rows, ...]
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return (self.rows, *self.parts[0].shape[1:])

    def __getitem__(self, rows: slice) -> Tensor:
        pieces, first = [], 0
        for part in self.parts:
            height = part.shape[0]
            start, stop = (
                max(rows.start or 0, first),
                min(self.rows if rows.stop is None else rows.stop, first + height),
            )
            if start < stop:
                pieces.append(part[start - first : stop - first])
            first += height
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def qwen2_5_vl_rows(
    theirs: Mapping[str, Rows], ours: Mapping[str, Tensor], config: TransformerConfig
) -> dict[str, Stacked]:
    """What a checkpoint holds for each of our keys: all rows, or, of embedding and head, the first `text_size`.

    What Qwen lacks (codes, connector, new vocabulary rows) is not in it. Arguments and errors as in `from_qwen2_5_vl`.
    """
    source = {_plain(key): value for key, value in theirs.items() if not key.startswith(("visual.", "model.visual."))}
    if "embed_tokens.weight" in source:
        source.setdefault("lm_head.weight", source["embed_tokens.weight"])
    result = {}
    missing = []
    for key, (parts, rows) in _partners(config).items():
        absent = [part for part in parts if part not in source]
        if absent or key not in ours:
            missing += absent or [key]
            continue
        tensors = tuple(source.pop(part) for part in parts)
        height = sum(tensor.shape[0] for tensor in tensors)
        if rows is not None and height < rows:
            raise ValueError(f"{parts[0]} has {height} rows, fewer than transformer.text_size {rows}")
        shape = (height if rows is None else ours[key].shape[0], *tensors[0].shape[1:])
        if shape != tuple(ours[key].shape):
            raise ValueError(f"{' + '.join(parts)} has shape {shape}, {key} {tuple(ours[key].shape)}")
        result[key] = Stacked(tensors, height if rows is None else rows)
    alone = {key for key in ours if key.startswith(OURS_ALONE)}
    unknown = sorted(source) + sorted(set(ours) - set(result) - alone - set(missing))
    if missing or unknown:
        raise ValueError(
            f"weights do not match transformer.num_layers {config.num_layers}: missing {missing}, without partner {unknown}"
        )
    return result


def from_qwen2_5_vl(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], config: TransformerConfig
) -> dict[str, Tensor]:
    """Weights of a checkpoint in our names; what Qwen lacks (codes, connector, new vocabulary rows) stays ours.

    Args:
        theirs: state dict of Qwen2_5_VLForConditionalGeneration, either style of keys. Without `lm_head.weight` (tied
            checkpoints) the embedding serves as head.
        ours: state dict of our transformer.
        config: its configuration. The first `text_size` rows of their vocabulary are taken.

    Raises:
        ValueError: a key on either side has no partner, or a shape differs; the message names it.
    """
    rows = qwen2_5_vl_rows(theirs, ours, config)
    return {
        key: torch.cat((rows[key][:].to(value), value[rows[key].rows :])) if key in rows else value
        for key, value in ours.items()
    }


def to_qwen2_5_vl(ours: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The text tower in transformers 5's names; image codes have no place there and are left out.

    Raises ValueError naming keys of `ours` that are not known.
    """
    partners = _partners(config)
    unknown = sorted(key for key in ours if key not in partners and not key.startswith(OURS_ALONE))
    if unknown:
        raise ValueError(f"not weights of this transformer: {unknown}")
    D = config.head_dim
    heights = {"q_proj": config.num_heads * D, "k_proj": config.num_kv_heads * D, "v_proj": config.num_kv_heads * D}
    result = {}
    for key, (parts, rows) in partners.items():
        pieces = [ours[key][:rows]]
        if len(parts) > 1:
            pieces = list(ours[key].split([heights.get(part.split(".")[-2], config.mlp_width) for part in parts]))
        for part, piece in zip(parts, pieces):
            result[part if part.startswith("lm_head") else f"model.language_model.{part}"] = piece.clone()
    return result


def _plain(key: str) -> str:
    for prefix in ("model.language_model.", "model."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _partners(config: TransformerConfig) -> dict[str, tuple[list[str], int | None]]:
    """Our key -> (their keys, stacked; rows that are theirs where the rest is ours)."""
    head = "head.weight" if config.head == "single" else "head.text.weight"
    partners: dict[str, tuple[list[str], int | None]] = {
        "token_embedding.weight": (["embed_tokens.weight"], config.text_size),
        "norm.weight": (["norm.weight"], None),
        head: (["lm_head.weight"], config.text_size),
    }
    for layer in range(config.num_layers):
        a, b = f"blocks.{layer}", f"layers.{layer}"
        for kind in ("weight", "bias"):
            partners[f"{a}.attention.qkv_proj.{kind}"] = ([f"{b}.self_attn.{x}_proj.{kind}" for x in "qkv"], None)
        partners[f"{a}.attention.o_proj.weight"] = ([f"{b}.self_attn.o_proj.weight"], None)
        partners[f"{a}.mlp.gate_up_proj.weight"] = ([f"{b}.mlp.{x}_proj.weight" for x in ("gate", "up")], None)
        partners[f"{a}.mlp.down_proj.weight"] = ([f"{b}.mlp.down_proj.weight"], None)
        partners[f"{a}.attention_norm.weight"] = ([f"{b}.input_layernorm.weight"], None)
        partners[f"{a}.mlp_norm.weight"] = ([f"{b}.post_attention_layernorm.weight"], None)
    return partners
