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

import torch
from torch import Tensor

from nextflow.models.transformer.config import TransformerConfig

OURS_ALONE = ("boundary_embedding.", "code_embedding.", "connector.", "scale_embedding.", "head.code.")


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
    source = {_plain(key): value for key, value in theirs.items() if not key.startswith(("visual.", "model.visual."))}
    if "embed_tokens.weight" in source:
        source.setdefault("lm_head.weight", source["embed_tokens.weight"])
    result = {key: value for key, value in ours.items() if key.startswith(OURS_ALONE)}
    missing = []
    for key, (parts, rows) in _partners(config).items():
        absent = [part for part in parts if part not in source]
        if absent or key not in ours:
            missing += absent or [key]
            continue
        value = torch.cat([source.pop(part) for part in parts])
        if rows is not None:
            if value.shape[0] < rows:
                raise ValueError(f"{parts[0]} has {value.shape[0]} rows, fewer than transformer.text_size {rows}")
            value = torch.cat((value[:rows].to(ours[key]), ours[key][rows:]))
        if value.shape != ours[key].shape:
            raise ValueError(f"{' + '.join(parts)} has shape {tuple(value.shape)}, {key} {tuple(ours[key].shape)}")
        result[key] = value
    unknown = sorted(source) + sorted(set(ours) - set(result) - set(missing))
    if missing or unknown:
        raise ValueError(
            f"weights do not match transformer.num_layers {config.num_layers}: missing {missing}, without partner {unknown}"
        )
    return {key: result[key] for key in ours}


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
