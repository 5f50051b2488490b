"""FlexAttention under the visibility law: the law is its mask function, and tiles without a visible pair are skipped. CUDA.

Uncompiled, as on a CPU, it computes all scores and has no backward pass: good for comparing values, and nothing else.

Shapes: B batch, H query heads, G key/value heads, L positions, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nextflow.kernels.visibility import Visibility


def flex(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, visibility: Visibility) -> Tensor:
    """Attention of a packed batch."""
    grouped = q_BHLD.shape[1] != k_BGLD.shape[1]
    kernel = _functions(q_BHLD.device.type).flex_attention
    return kernel(q_BHLD, k_BGLD, v_BGLD, block_mask=visibility.block_mask(), enable_gqa=grouped)


def block_mask(document_BL: Tensor, block_BL: Tensor):
    """The law as a BlockMask; call it once per batch, through `Visibility.block_mask`."""
    return _functions(document_BL.device.type).create(document_BL, block_BL)


def create(document_BL: Tensor, block_BL: Tensor):
    """The same, not compiled. The law is made in here so that a compiled version belongs to all batches."""
    from torch.nn.attention.flex_attention import create_block_mask

    def law(b, h, q, k):
        return (document_BL[b, q] == document_BL[b, k]) & (block_BL[b, k] <= block_BL[b, q])

    B, L = document_BL.shape
    return create_block_mask(law, B, None, L, L, device=document_BL.device)


@dataclass(frozen=True)
class _Functions:
    flex_attention: Callable[..., Any]
    create: Callable[..., Any]


@cache
def _functions(device_type: str) -> _Functions:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cuda":
        return _Functions(flex_attention, create)
    # Uncompiled, both materialise [B, H, L, L]; dynamic shapes, because packs of a curriculum differ in length.
    return _Functions(torch.compile(flex_attention, dynamic=True), torch.compile(create, dynamic=True))
