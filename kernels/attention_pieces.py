"""Attention on a CPU in 16 bits where all queries of a row see the same keys: a step of cached decoding.

PyTorch's fused kernel makes its products in float32 there, at half the rate of products in bfloat16, unless the processor has
AMX, whose tiles it uses. Here each row and group of query heads is worked off in pieces of queries, two products and a softmax
each, whose scores stay in the cache.

Shapes: B batch, H query heads in G groups, G key/value heads, N queries, L keys, D head width; M queries of a group, m of a
piece.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nextflow.kernels.visibility import Visibility, hidden_bias

PIECE_ELEMENTS = 2**20
"""Scores of a piece: 2 MiB."""
LEAST_QUERIES = 256
"""Queries of a group that the products need to be faster than the fused kernel."""


def is_faster_in_pieces(q_BHND: Tensor, k_BGLD: Tensor, mask_BNL: Tensor | None) -> bool:
    """Whether `auto` takes `attention_pieces`."""
    queries = q_BHND.shape[1] // k_BGLD.shape[1] * q_BHND.shape[2]
    fits = q_BHND.device.type == "cpu" and q_BHND.dtype == torch.bfloat16 and queries >= LEAST_QUERIES
    return fits and not has_amx() and _why_not(q_BHND, k_BGLD, mask_BNL) is None


@lru_cache(maxsize=1)
def has_amx() -> bool:
    """Whether this processor multiplies bfloat16 in tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


# Its loop depends on the batch and not on the graph.
@torch.compiler.disable
def attention_pieces(
    q_BHND: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, visibility: Visibility | Tensor | None = None
) -> Tensor:
    """Attention [B, H, N, D]; `visibility` is None, or the keys that each row sees, bool [B, 1, L].

    Raises:
        ValueError: queries of one row may see different keys, or a gradient is asked for.
    """
    why_not = _why_not(q_BHND, k_BGLD, visibility)
    if why_not is not None:
        raise ValueError(f"attention: 'pieces' is for steps of cached decoding, but {why_not}; use 'auto' here")
    (B, H, N, D), (G, L) = q_BHND.shape, k_BGLD.shape[1:3]
    # The queries of a group stand behind each other, so that keys and values need no copies per query head.
    q_BGMD = (q_BHND * D**-0.5).reshape(B, G, H // G * N, D)
    y_BGMD = torch.empty_like(q_BGMD)
    size = max(16, PIECE_ELEMENTS // L)
    for row in range(B):
        k_GLD, v_GLD = k_BGLD[row], v_BGLD[row]
        bias_L = hidden_bias(visibility[row, 0], q_BHND.dtype) if isinstance(visibility, Tensor) else None
        for k_LD, v_LD, q_MD, y_MD in zip(k_GLD, v_GLD, q_BGMD[row], y_BGMD[row]):
            for q_mD, y_mD in zip(q_MD.split(size), y_MD.split(size)):
                score_mL = q_mD @ k_LD.T if bias_L is None else torch.addmm(bias_L, q_mD, k_LD.T)
                torch.mm(score_mL.softmax(-1), v_LD, out=y_mD)
    return y_BGMD.view(B, H, N, D)


def _why_not(q_BHND: Tensor, k_BGLD: Tensor, visibility: Visibility | Tensor | None) -> str | None:
    if torch.is_grad_enabled() and (q_BHND.requires_grad or k_BGLD.requires_grad):
        return "a gradient is asked for"
    if visibility is None or (isinstance(visibility, Tensor) and visibility.shape[1] == 1):
        return None
    return "queries of one row may see different keys"
