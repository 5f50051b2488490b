"""Attention under the one visibility law of text, images and packs (`visibility.py`), with its implementations.

    flex        FlexAttention: the law is its mask function and empty tiles are skipped (`attention_flex.py`). CUDA.
    flash       flash-attn, for calls without a mask or rows of one plain text (`attention_flash.py`). CUDA.
    spans       matrix products over stacks of short documents, and over the visible keys of each span of queries of long ones
                (`attention_spans.py`). Made for CPUs.
    dense       two matrix products and a softmax over all scores; in bfloat16 on a CPU the fastest for short rows.
    pieces      a scale in cached decoding, some queries at a time (`attention_pieces.py`). For bfloat16 on CPUs without AMX.
    sdpa        `scaled_dot_product_attention` with a dense mask, which never holds all scores. Runs everywhere.
    reference   the definition, to compare with

All have one signature and the same result; a packed batch's masks, tiles and spans are built once and shared by all layers.

Shapes: B batch, H query heads, G key/value heads (H a multiple of G), L keys, N queries, D head width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.kernels.attention_flash import can_flash, flash, has_flash
from nextflow.kernels.attention_flex import flex
from nextflow.kernels.attention_pieces import attention_pieces, is_faster_in_pieces
from nextflow.kernels.attention_spans import attention_spans, most_stacked_pairs
from nextflow.kernels.implementation import announce
from nextflow.kernels.visibility import Visibility, hidden_bias

Implementation = Literal["auto", "sdpa", "dense", "spans", "pieces", "flex", "flash", "reference"]

# Scores that `auto` lets `dense` hold at once on CPU: 128 MiB in bfloat16.
DENSE_ELEMENTS = 2**26
# What a span costs on a CPU beside its scores, in scores of one head: the calls around small matrix products, which prepare
# longer in 16 bits.
SPAN_ELEMENTS = {torch.float32: 2**14, torch.bfloat16: 2**17, torch.float16: 2**17}


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
        implementation: "auto" takes for a packed batch flex on CUDA, and on CPU whichever of spans, dense (16 bits) and sdpa
            has the least to do; without a mask flash on CUDA when it is installed; for many queries that see the same keys
            pieces in bfloat16 on a CPU without AMX; otherwise sdpa. A named one runs or raises.

    Returns:
        [B, H, N, D].

    Raises:
        ValueError: `implementation` cannot run here.
    """
    if implementation == "auto":
        implementation = _choose(q_BHND, k_BGLD, visibility)
        announce(f"attention ({_kind(visibility)})", implementation, q_BHND.device.type)
    if implementation == "reference":
        return attention_ref(q_BHND, k_BGLD, v_BGLD, visibility)
    if implementation == "flash":
        return flash(q_BHND, k_BGLD, v_BGLD, visibility)
    if implementation == "pieces":
        return attention_pieces(q_BHND, k_BGLD, v_BGLD, visibility)
    if implementation in ("flex", "spans"):
        if not isinstance(visibility, Visibility):
            raise ValueError(
                f"attention: {implementation!r} needs the documents and blocks of a packed batch; use 'auto' or 'sdpa' here"
            )
        if implementation == "spans":
            return attention_spans(q_BHND, k_BGLD, v_BGLD, visibility)
        if not q_BHND.is_cuda and torch.is_grad_enabled() and q_BHND.requires_grad:
            raise ValueError(
                "attention: 'flex' has no backward on CPU; set attention to 'auto' or 'spans', or train on CUDA"
            )
        return flex(q_BHND, k_BGLD, v_BGLD, visibility)
    if implementation not in ("sdpa", "dense"):
        raise ValueError(f"attention: {implementation!r} is none of {', '.join(map(repr, get_args(Implementation)))}")
    if isinstance(visibility, Visibility):
        bias_B1NL = visibility.bias_B1LL(q_BHND.dtype)
    elif visibility is None:
        bias_B1NL = None
    else:
        bias_B1NL = hidden_bias(visibility[:, None], q_BHND.dtype)
    return (_dense if implementation == "dense" else _sdpa)(q_BHND, k_BGLD, v_BGLD, bias_B1NL)


def prepare(visibility: Visibility, implementation: Implementation, device: torch.device) -> None:
    """Build what the layers of a model share, before the first of them asks for it from inside of a compiled block."""
    if implementation == "flex" or (implementation == "auto" and device.type == "cuda"):
        visibility.block_mask()


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


# What it decides depends on the batch and not on the graph, so a compiled block asks it from outside.
@torch.compiler.disable
def _choose(q_BHND: Tensor, k_BGLD: Tensor, visibility: Visibility | Tensor | None) -> Implementation:
    if not isinstance(visibility, Visibility):
        if is_faster_in_pieces(q_BHND, k_BGLD, visibility):
            return "pieces"
        return "flash" if visibility is None and can_flash(q_BHND) and has_flash() else "sdpa"
    if q_BHND.is_cuda:
        return "flex"
    if q_BHND.device.type != "cpu":
        return "sdpa"
    H, all_scores = q_BHND.shape[1], q_BHND.shape[:3].numel() * k_BGLD.shape[2]
    if visibility.is_ordered():
        spans, stacks = visibility.spans(q_BHND.dtype), visibility.stacks(most_stacked_pairs(H), q_BHND.dtype)
        pairs = sum(span.pairs for span in spans) + sum(stack.pairs for stack in stacks)
        beside = SPAN_ELEMENTS.get(q_BHND.dtype, 0) * (len(spans) + len(stacks))
        if H * pairs + beside < all_scores:
            return "spans"
    return "dense" if all_scores <= DENSE_ELEMENTS and q_BHND.dtype != torch.float32 else "sdpa"


def _kind(visibility: Visibility | Tensor | None) -> str:
    return "packed batch" if isinstance(visibility, Visibility) else "no mask" if visibility is None else "mask"


def _sdpa(q_BHND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, bias_B1NL: Tensor | None) -> Tensor:
    (B, H, N, D), G = q_BHND.shape, k_BGLD.shape[1]
    if bias_B1NL is None or bias_B1NL.shape[2] == 1:
        # All queries see the same keys, as in a step of cached decoding: those of a group stand behind each other, and keys
        # and values need no copies per query head.
        q_BGMD = q_BHND.reshape(B, G, H // G * N, D)
        return F.scaled_dot_product_attention(q_BGMD, k_BGLD, v_BGLD, attn_mask=bias_B1NL).view(B, H, N, D)
    if H > G:
        k_BGLD, v_BGLD = k_BGLD.repeat_interleave(H // G, dim=1), v_BGLD.repeat_interleave(H // G, dim=1)
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
