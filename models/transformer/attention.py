"""Grouped-query self-attention of Qwen2.5: biased q, k, v, rotary embedding on q and k, no bias on the way out.

Shapes: B batch, L positions, W width, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from nextflow.kernels.attention import Implementation, Visibility, attention
from nextflow.kernels.rope import Rotation, apply_rope
from nextflow.models.transformer.config import DecoderConfig


class DecodeCache(Protocol):
    """Where cached decoding keeps keys and values (`nextflow.generation.cache.KVCache`)."""

    def append(self, layer: int, k_BGND: Tensor, v_BGND: Tensor) -> tuple[Tensor, Tensor, Visibility | Tensor | None]:
        """Store the keys and values of new positions; returns all of them and who sees whom, as `attention` takes it."""
        ...


class SelfAttention(nn.Module):
    """q, k and v are one projection, rows in that order: one matrix product, and one rotation turns q and k together.

    Args:
        config: width, heads and their width.
        layer: number of the block, the cache's key.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.implementation: Implementation = "auto"
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.width, rows, bias=True)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)

    def forward(
        self, x_BLW: Tensor, rotation: Rotation, visibility: Visibility | None, cache: DecodeCache | None = None
    ) -> Tensor:
        """Attend within the packed batch, or, with a cache, from new positions to everything cached."""
        B, L, _ = x_BLW.shape
        H, G, D = self.num_heads, self.num_kv_heads, self.head_dim
        qkv_BTLD = self.qkv_proj(x_BLW).view(B, L, H + 2 * G, D).transpose(1, 2)
        qk_BSLD, v_BGLD = qkv_BTLD.split((H + G, G), dim=1)
        q_BHLD, k_BGLD = apply_rope(qk_BSLD, *rotation.to(qk_BSLD.dtype)).split((H, G), dim=1)
        visible: Visibility | Tensor | None = visibility
        if cache is not None:
            k_BGLD, v_BGLD, visible = cache.append(self.layer, k_BGLD, v_BGLD)
        y_BHLD = attention(q_BHLD, k_BGLD, v_BGLD, visible, self.implementation if cache is None else "auto")
        return self.o_proj(y_BHLD.transpose(1, 2).reshape(B, L, H * D))
