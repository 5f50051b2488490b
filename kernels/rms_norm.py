"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32.

    torch    `torch.nn.functional.rms_norm`
    triton   one kernel per pass (`rms_norm_triton.py`). CUDA.

Shapes: D width; any axes may stand in front of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.kernels.implementation import resolve

Implementation = Literal["auto", "torch", "triton", "reference"]


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float = 1e-6, implementation: Implementation = "auto") -> Tensor:
    """Normalise the last axis; one fused op. The result has the dtype of x.

    Args:
        x_D: [..., D].
        weight_D: gain of each channel, any floating dtype.
        eps: added to the mean square.
        implementation: "auto", "torch", "triton" or "reference".

    Raises:
        ValueError: `implementation` cannot run here.
    """
    chosen = resolve("rms_norm", implementation, x_D.device.type, anywhere="torch")
    if chosen == "reference":
        return rms_norm_ref(x_D, weight_D, eps)
    if chosen == "triton":
        from nextflow.kernels.rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x_D, weight_D, eps)
    if x_D.dtype != weight_D.dtype:
        weight_D = weight_D.to(x_D.dtype)
    return F.rms_norm(x_D, weight_D.shape, weight_D, eps)


def rms_norm_ref(x_D: Tensor, weight_D: Tensor, eps: float = 1e-6, implementation: Implementation = "auto") -> Tensor:
    """The definition, in float32."""
    x32_D = x_D.float()
    return (x32_D * torch.rsqrt(x32_D.square().mean(-1, keepdim=True) + eps)).to(x_D.dtype) * weight_D.to(x_D.dtype)
