"""The semantic branch: SigLIP 2's NaFlex vision tower, the projection to code channels, and the decoder back to its features.

The tower is transformers' `Siglip2VisionModel` with the patch size set to the stride, so one patch is one cell of the
last grid and any grid works. Its feature is one hidden state (the second to last in TokenFlow and here); layers above
it and the pooling head are not built. Hidden states are the layers' bare outputs, but the last one is taken behind the
tower's last norm, as `last_hidden_state` is: nothing in SigLIP reads it without. All images of a batch share a grid,
hence no padding and no mask, and position embeddings are resized once per batch. Images are in [-1, 1], which is
SigLIP's normalisation (mean 0.5, standard deviation 0.5).

B images, N patches = cells, D tower width, S semantic code channels, H x W cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer, Siglip2VisionEmbeddings

from nextflow.models.tokenizer.config import SemanticConfig, TokenizerConfig


class SemanticTower(nn.Module):
    """Images [B, 3, H * patch, W * patch] in [-1, 1] -> hidden state [B, N, D] of the SigLIP 2 vision tower."""

    def __init__(self, config: SemanticConfig, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        vision = Siglip2VisionModel(
            Siglip2VisionConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                num_patches=config.num_patches,
                patch_size=patch_size,
                vision_use_head=False,
            )
        )
        self.embeddings, self.layers = vision.embeddings, vision.encoder.layers
        self.norm = vision.post_layernorm if config.depth == config.num_layers else nn.Identity()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BND = naflex_embeddings(self.embeddings, images_BCHW)
        for layer in self.layers:
            x_BND = layer(x_BND, None)
        return self.norm(x_BND)


class SemanticFeatures(NamedTuple):
    """What the semantic encoder makes of images."""

    code_BSHW: Tensor
    """Projected to code channels, to be quantised."""
    tower_BND: Tensor
    """The tower's feature itself."""


class SemanticEncoder(nn.Module):
    """Images -> semantic features: the tower, then Linear-Tanh-Linear."""

    def __init__(self, config: SemanticConfig, semantic_dim: int, patch_size: int) -> None:
        super().__init__()
        self.tower = SemanticTower(config, patch_size)
        self.project = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, semantic_dim)
        )

    def forward(self, images_BCHW: Tensor) -> SemanticFeatures:
        height, width = (size // self.tower.patch_size for size in images_BCHW.shape[-2:])
        tower_BND = self.tower(images_BCHW)
        return SemanticFeatures(self.project(tower_BND).mT.unflatten(-1, (height, width)), tower_BND)


class SemanticDecoder(nn.Module):
    """Quantised semantic features [B, S, H, W] -> tower features [B, N, D]: a small transformer, then Linear-Tanh-Linear."""

    def __init__(self, config: SemanticConfig, semantic_dim: int) -> None:
        super().__init__()
        width = config.decoder_width
        layer_config = Siglip2VisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=config.decoder_heads,
        )
        layer_config._attn_implementation = "sdpa"
        self.embed = nn.Linear(semantic_dim, width)
        self.layers = nn.ModuleList(Siglip2EncoderLayer(layer_config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Sequential(nn.Linear(width, config.width), nn.Tanh(), nn.Linear(config.width, config.width))

    def forward(self, features_BSHW: Tensor) -> Tensor:
        x_BND = self.embed(features_BSHW.flatten(2).mT)
        x_BND = x_BND + _sine_positions(features_BSHW.shape[2], features_BSHW.shape[3], x_BND.shape[2], x_BND.device)
        for layer in self.layers:
            x_BND = layer(x_BND, None)
        return self.project(self.norm(x_BND))


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Images -> NaFlex `pixel_values` [B, N, patch * patch * 3], channels last inside a patch as in SigLIP 2's processor."""
    height, width = images_BCHW.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"image sides {height} x {width} must be multiples of the patch size {patch_size}")
    x_BChpwp = images_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return x_BChpwp.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def naflex_embeddings(embeddings: Siglip2VisionEmbeddings, images_BCHW: Tensor) -> Tensor:
    """Patch embeddings plus position embeddings, [B, N, D], of `Siglip2VisionEmbeddings` for images that share one grid.

    The same numbers as the module's own forward pass, which resizes the position table once per image.
    """
    patch_size = int(embeddings.patch_size)  # type: ignore[arg-type]  # always one number in SigLIP 2
    side = embeddings.position_embedding_size
    grid_12 = torch.tensor([[size // patch_size for size in images_BCHW.shape[-2:]]])
    table_hwD = embeddings.position_embedding.weight.reshape(side, side, -1)
    with torch.autocast(images_BCHW.device.type, enabled=False):
        positions_1ND = embeddings.resize_positional_embeddings(table_hwD, grid_12, int(grid_12.prod()))  # type: ignore[arg-type]
    patches_BNV = patchify(images_BCHW, patch_size).to(embeddings.patch_embedding.weight.dtype)
    return embeddings.patch_embedding(patches_BNV) + positions_1ND


def read_semantic_config(folder: str | Path, base: SemanticConfig, patch_size: int) -> SemanticConfig:
    """`base` with the tower's sizes as a Hugging Face SigLIP 2 folder states them.

    Raises FileNotFoundError or ValueError, naming the key `semantic_encoder`, for a folder that is none, that holds
    another kind of model, or whose patch size is not the stride.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"semantic_encoder: {path} does not exist; give the folder of a saved Siglip2Model")
    values = _read_json(path)
    if values.get("model_type") not in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"semantic_encoder: {folder} holds a model of type {values.get('model_type')}; a Siglip2Model or "
            "Siglip2VisionModel is needed (of the published ones those with `naflex` in their name)"
        )
    vision = Siglip2VisionConfig(**values.get("vision_config", values))
    if vision.patch_size != patch_size:
        raise ValueError(
            f"semantic_encoder: {folder} has patches of {vision.patch_size} pixels, "
            f"but tokenizer.schedule.stride is {patch_size}"
        )
    for name, expected in {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3}.items():
        if getattr(vision, name) != expected:
            raise ValueError(
                f"semantic_encoder: {path} has {name} {getattr(vision, name)}; SigLIP 2 towers have {expected}"
            )
    return replace(
        base,
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        num_patches=vision.num_patches,
    )


def read_tower(folder: str | Path, config: TokenizerConfig) -> SemanticTower:
    """The tower of a tokenizer's configuration with the weights of a folder; raises what `load_tower` raises."""
    assert config.semantic is not None
    tower = SemanticTower(config.semantic, config.schedule.stride)
    load_tower(tower, folder)
    return tower


def load_tower(tower: SemanticTower, folder: str | Path) -> None:
    """Fill `tower` with the weights of a Hugging Face SigLIP 2 folder (a `Siglip2Model` or a `Siglip2VisionModel`).

    Raises FileNotFoundError or ValueError, naming the key `semantic_encoder`, when the weights are missing, or one of
    the vision weights is missing, unexpected or of another shape.
    """
    tower.load_state_dict(tower_weights(tower, _read_vision_weights(Path(folder)), str(folder)))


def tower_weights(tower: SemanticTower, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Hugging Face's vision weights under the tower's names; those above the chosen hidden state are left out.

    Raises ValueError, naming the key `semantic_encoder`, `source` and the weights, when the rest is not the tower's.
    """
    state = {
        key.removeprefix("vision_model.").removeprefix("encoder.").replace("post_layernorm.", "norm."): value
        for key, value in weights.items()
        if not key.startswith(_OTHER_TOWER)
    }
    ours = tower.state_dict()
    above = {key for key in set(state) - set(ours) if key.startswith(_ABOVE) or _layer_number(key) >= len(tower.layers)}
    wrong = {
        "missing": sorted(set(ours) - set(state)),
        "unexpected": sorted(set(state) - set(ours) - above),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(ours[key].shape)}"
            for key in sorted(set(ours) & set(state))
            if ours[key].shape != state[key].shape
        ],
    }
    if any(wrong.values()):
        told = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"semantic_encoder: the vision weights in {source} do not fit the tower: {told}")
    return {key: state[key] for key in ours}


_OTHER_TOWER = ("text_model.", "logit_scale", "logit_bias")
_ABOVE = ("norm.", "head.")


def _layer_number(key: str) -> int:
    return int(key.split(".")[1]) if key.startswith("layers.") else -1


def _read_vision_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(_read_json(index).get("weight_map", {}).values())
        if not names:
            raise ValueError(f"semantic_encoder: {index} has no weight_map")
    weights: dict[str, Tensor] = {}
    for path in (folder / name for name in sorted(names)):
        if not path.is_file():
            raise FileNotFoundError(
                f"semantic_encoder: {path} does not exist; give a folder that Siglip2Model.save_pretrained wrote"
            )
        try:
            with safe_open(path, framework="pt") as file:  # the text tower, two thirds of the file, is not read
                keys = [key for key in file.keys() if not key.startswith(_OTHER_TOWER)]  # noqa: SIM118 (it is no dict)
                weights |= {key: file.get_tensor(key) for key in keys}
        except SafetensorError as error:
            raise ValueError(f"semantic_encoder: {path} is no safetensors file, or a damaged one ({error})") from error
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"semantic_encoder: {path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"semantic_encoder: {path} holds no JSON object")
    return values


def _sine_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Sine and cosine of row and column, [N, dim]: defined on any grid."""
    frequency = 10000.0 ** (-torch.arange((dim + 3) // 4, device=device) / ((dim + 3) // 4))
    row = torch.arange(height, device=device)[:, None, None] * frequency
    column = torch.arange(width, device=device)[None, :, None] * frequency
    row, column = row.expand(height, width, -1), column.expand(height, width, -1)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=-1).flatten(0, 1)[:, :dim]
