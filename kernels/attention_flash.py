"""The package flash-attn for what it can express: every query sees every key, or a row is one text. CUDA, 16 bits.

Shapes: B batch, H query heads, G key/value heads, N queries, L keys, D head width.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from nextflow.kernels.visibility import Visibility


def flash(q_BHND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, visibility: Visibility | Tensor | None) -> Tensor:
    """Attention without a mask, or causal where each row is one text.

    Raises:
        ValueError: flash-attn is not installed, cannot run on these tensors, or cannot express this visibility.
    """
    if isinstance(visibility, Tensor) or (visibility is not None and not visibility.is_causal()):
        raise ValueError(
            "attention: 'flash' is for calls without a mask or rows of one plain text; this batch has "
            "images, several documents, padding or a mask: use 'auto' or 'flex'"
        )
    if not has_flash():
        raise ValueError(
            "attention: 'flash' needs the package flash-attn, which is not installed; "
            "pip install flash-attn on a machine with CUDA, or use 'auto'"
        )
    if not can_flash(q_BHND):
        raise ValueError(
            f"attention: 'flash' runs on CUDA in float16 or bfloat16, not on {q_BHND.device.type} in {q_BHND.dtype}; use 'auto'"
        )
    from flash_attn import flash_attn_func

    # flash-attn wants positions before heads.
    y_BNHD = flash_attn_func(*(x.transpose(1, 2) for x in (q_BHND, k_BGLD, v_BGLD)), causal=visibility is not None)
    return y_BNHD.transpose(1, 2)


@cache
def has_flash() -> bool:
    """Whether flash-attn is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def can_flash(q_BHND: Tensor) -> bool:
    """Whether flash-attn has kernels for such tensors."""
    return q_BHND.is_cuda and q_BHND.dtype in (torch.float16, torch.bfloat16) and q_BHND.shape[-1] <= 256
