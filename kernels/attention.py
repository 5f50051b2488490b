"""Attention under the one visibility law of text, images and packs (paper section 2.2, design of VAR).

    query q sees key k   iff   document[q] == document[k]  and  block[k] <= block[q]

A text token is a block of its own and a scale of an image is one block, so text is causal and a scale sees itself, all
coarser scales and everything before the image. Padding is document -1 and sees only padding.

Three implementations with one signature; a packed batch's mask is built once and shared by all layers:

    flex    FlexAttention: the law is its mask function and empty tiles are skipped. CUDA.
    dense   two matrix products and a softmax; in bfloat16 on CPU several times faster than sdpa (`benchmarks/attention.py`).
    sdpa    `scaled_dot_product_attention` with a dense mask, which never holds all scores. Runs everywhere.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), L keys, N queries, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Implementation = Literal["auto", "sdpa", "dense", "flex"]

# Scores that `auto` lets `dense` hold at once on CPU: 128 MiB in bfloat16.
DENSE_ELEMENTS = 2**26


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom in a packed batch; masks are built on first use and shared by all layers.

    Args:
        document_BL: int64, number of the document of each position, -1 for padding.
        block_BL: int64, running number of the block of each position.
    """

    document_BL: Tensor
    block_BL: Tensor
    _masks: dict = field(default_factory=dict, repr=False)

    def mask_BLL(self) -> Tensor:
        """The law itself: bool [B, query, key]."""
        same_BLL = self.document_BL[:, :, None] == self.document_BL[:, None, :]
        return same_BLL & (self.block_BL[:, None, :] <= self.block_BL[:, :, None])

    def bias_B1LL(self, dtype: torch.dtype) -> Tensor:
        """0 where visible and -inf elsewhere; SDPA would otherwise convert a bool mask again in every layer."""
        if dtype not in self._masks:
            self._masks[dtype] = _bias(self.mask_BLL()[:, None], dtype)
        return self._masks[dtype]

    def block_mask(self):
        """The law as FlexAttention's BlockMask."""
        if "flex" not in self._masks:
            document_BL, block_BL = self.document_BL, self.block_BL

            def law(b, h, q, k):
                return (document_BL[b, q] == document_BL[b, k]) & (block_BL[b, k] <= block_BL[b, q])

            B, L = document_BL.shape
            build = _flex(document_BL.device.type).create_block_mask
            self._masks["flex"] = build(law, B, None, L, L, device=document_BL.device)
        return self._masks["flex"]


def attention(
    q_BHND: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    visibility: Visibility | Tensor | None,
    implementation: Implementation = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D), visible keys only) v, heads of k and v shared by groups of query heads.

    Args:
        visibility: the law of a packed batch (then N = L), or the visible keys as bool [B, N, L] (cached decoding), or None
            when every query sees every key.
        implementation: "auto" takes flex for a packed batch on CUDA, dense for a packed batch in 16 bits on CPU while its
            scores are few, and sdpa otherwise; a named one runs or raises.

    Returns:
        [B, H, N, D].

    Raises:
        ValueError: `implementation` cannot run here.
    """
    if implementation == "auto":
        implementation = _choose(q_BHND, k_BGLD, visibility)
    if implementation == "flex":
        return _flex_attention(q_BHND, k_BGLD, v_BGLD, visibility)
    if implementation not in ("sdpa", "dense"):
        raise ValueError(f"attention: {implementation!r} is none of 'auto', 'sdpa', 'dense', 'flex'")
    if isinstance(visibility, Visibility):
        bias_B1NL = visibility.bias_B1LL(q_BHND.dtype)
    elif visibility is None:
        bias_B1NL = None
    else:
        bias_B1NL = _bias(visibility[:, None], q_BHND.dtype)
    return (_dense if implementation == "dense" else _sdpa)(q_BHND, k_BGLD, v_BGLD, bias_B1NL)


def attention_ref(
    q_BHND: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    visibility: Visibility | Tensor | None,
    implementation: Implementation = "auto",
) -> Tensor:
    """The definition: scores, mask, softmax in float32, weighted sum."""
    repeats = q_BHND.shape[1] // k_BGLD.shape[1]
    k_BHLD, v_BHLD = k_BGLD.repeat_interleave(repeats, dim=1), v_BGLD.repeat_interleave(repeats, dim=1)
    score_BHNL = (q_BHND @ k_BHLD.transpose(-1, -2)).float() * q_BHND.shape[-1] ** -0.5
    if visibility is not None:
        mask_BNL = visibility.mask_BLL() if isinstance(visibility, Visibility) else visibility
        score_BHNL = score_BHNL.masked_fill(~mask_BNL[:, None], float("-inf"))
    return score_BHNL.softmax(-1).to(v_BHLD.dtype) @ v_BHLD


def _choose(q_BHND: Tensor, k_BGLD: Tensor, visibility: Visibility | Tensor | None) -> Implementation:
    if not isinstance(visibility, Visibility):
        return "sdpa"
    if q_BHND.is_cuda:
        return "flex"
    few = q_BHND.shape[:3].numel() * k_BGLD.shape[2] <= DENSE_ELEMENTS
    return "dense" if few and q_BHND.device.type == "cpu" and q_BHND.dtype != torch.float32 else "sdpa"


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _sdpa(q_BHND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, bias_B1NL: Tensor | None) -> Tensor:
    repeats = q_BHND.shape[1] // k_BGLD.shape[1]
    if repeats > 1:
        k_BGLD, v_BGLD = k_BGLD.repeat_interleave(repeats, dim=1), v_BGLD.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(q_BHND, k_BGLD, v_BGLD, attn_mask=bias_B1NL)


def _dense(q_BHND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, bias_B1NL: Tensor | None) -> Tensor:
    (B, H, N, D), (G, L) = q_BHND.shape, k_BGLD.shape[1:3]
    # The queries of a group stand behind each other, so that keys and values need no copies per query head.
    q_BGMD = (q_BHND * D**-0.5).reshape(B, G, H // G * N, D)
    score_BHNL = (q_BGMD @ k_BGLD.transpose(-1, -2)).view(B, H, N, L)
    if bias_B1NL is not None:
        score_BHNL = score_BHNL + bias_B1NL
    weight_BGML = score_BHNL.softmax(-1).to(v_BGLD.dtype).view(B, G, H // G * N, L)
    return (weight_BGML @ v_BGLD).view(B, H, N, D)


def _flex_attention(q_BHND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, visibility: Visibility | Tensor | None) -> Tensor:
    if not isinstance(visibility, Visibility):
        raise ValueError(
            "attention: 'flex' needs the documents and blocks of a packed batch; use 'auto' or 'sdpa' here"
        )
    if not q_BHND.is_cuda and torch.is_grad_enabled() and q_BHND.requires_grad:
        raise ValueError(
            "attention: 'flex' has no backward on CPU; set attention to 'auto' or 'sdpa', or train on CUDA"
        )
    grouped = q_BHND.shape[1] != k_BGLD.shape[1]
    flex = _flex(q_BHND.device.type).flex_attention
    return flex(q_BHND, k_BGLD, v_BGLD, block_mask=visibility.block_mask(), enable_gqa=grouped)


@dataclass(frozen=True)
class _Flex:
    flex_attention: Callable[..., Any]
    create_block_mask: Callable[..., Any]


@cache
def _flex(device_type: str) -> _Flex:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device_type != "cuda":
        return _Flex(flex_attention, create_block_mask)
    # Uncompiled, both materialise [B, H, L, L]; dynamic shapes, because packs of a curriculum differ in length.
    return _Flex(torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True))
