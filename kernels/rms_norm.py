"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last axis; one fused op. The result has the dtype of x.

    Args:
        x_D: [..., D].
        weight_D: gain of each channel, any floating dtype.
        eps: added to the mean square.
    """
    if x_D.dtype != weight_D.dtype:
        weight_D = weight_D.to(x_D.dtype)
    return F.rms_norm(x_D, weight_D.shape, weight_D, eps)


def rms_norm_ref(x_D: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, in float32."""
    x32_D = x_D.float()
    return (x32_D * torch.rsqrt(x32_D.square().mean(-1, keepdim=True) + eps)).to(x_D.dtype) * weight_D.to(x_D.dtype)
