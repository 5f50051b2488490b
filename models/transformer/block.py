"""One decoder block of Qwen2.5: x + attention(norm(x)), then x + mlp(norm(x)), the MLP gated by SiLU.

Shapes: B batch, L positions, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextflow.kernels.attention import Visibility
from nextflow.kernels.linear import linear
from nextflow.kernels.rms_norm import rms_norm
from nextflow.kernels.rope import Rotation
from nextflow.models.transformer.attention import DecodeCache, SelfAttention
from nextflow.models.transformer.config import DecoderConfig


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_BLW: Tensor, rotation: Rotation, visibility: Visibility | None, cache: DecodeCache | None = None
    ) -> Tensor:
        """One block of the stream [B, L, W]."""
        x_BLW = x_BLW + self.attention(self.attention_norm(x_BLW), rotation, visibility, cache)
        return x_BLW + self.mlp(self.mlp_norm(x_BLW))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one projection, rows in that order."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BLW: Tensor) -> Tensor:
        """[B, L, W] to [B, L, W]."""
        gate, up = linear(x_BLW, self.gate_up_proj.weight).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class RMSNorm(nn.Module):
    """`kernels.rms_norm` with its gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BLW: Tensor) -> Tensor:
        """Normalise the last axis."""
        return rms_norm(x_BLW, self.weight, self.eps)
