"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32.

    torch    `torch.nn.functional.rms_norm`; on a CPU, where that is a chain of ops that keeps two more tensors, two passes in
             pieces that fit into the cache
    triton   one kernel per pass (`rms_norm_triton.py`). CUDA.

    dx = r (g w - x r mean(g w x r)),   dw = sum over rows of g x r,   r = 1 / sqrt(mean(x^2) + eps)

Shapes: D width; any axes may stand in front of it; N rows, C rows of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.kernels.implementation import resolve

Implementation = Literal["auto", "torch", "triton", "reference"]

PIECE_ELEMENTS = 2**17
"""Elements of a piece on a CPU: its float32 temporaries stay in the second-level cache."""


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
    # A step that writes text has one position per row: calls cost more than passes there, and fused ops are the fewest.
    one_position = not torch.is_grad_enabled() and x_D.dim() > 1 and x_D.shape[-2] == 1
    if x_D.device.type == "cpu" and not one_position and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x_D, weight_D, eps)
    if x_D.dtype != weight_D.dtype:
        weight_D = weight_D.to(x_D.dtype)
    return F.rms_norm(x_D, weight_D.shape, weight_D, eps)


def rms_norm_ref(x_D: Tensor, weight_D: Tensor, eps: float = 1e-6, implementation: Implementation = "auto") -> Tensor:
    """The definition, in float32."""
    x32_D = x_D.float()
    return (x32_D * torch.rsqrt(x32_D.square().mean(-1, keepdim=True) + eps)).to(x_D.dtype) * weight_D.to(x_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND, D = x_D.reshape(-1, x_D.shape[-1]), x_D.shape[-1]
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        length_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=dtype)
        r_N1 = length_N1.square_().div_(D).add_(eps).rsqrt_()
        y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        for x_CD, r_C1, y_CD in _pieces(x_ND, r_N1, y_ND):
            torch.mul(x_CD * r_C1, weight_D, out=y_CD)
        ctx.save_for_backward(x_ND, weight_D, r_N1)
        return y_ND.view(x_D.shape)

    @staticmethod
    def backward(ctx, grad_D: Tensor):
        x_ND, weight_D, r_N1 = ctx.saved_tensors
        grad_ND, D = grad_D.reshape(x_ND.shape), x_ND.shape[-1]
        grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        grad_weight_D = torch.zeros_like(weight_D, dtype=r_N1.dtype)
        weight_dtype, weight_D = weight_D.dtype, weight_D.to(r_N1.dtype)
        for x_CD, r_C1, grad_CD, grad_x_CD in _pieces(x_ND, r_N1, grad_ND, grad_x_ND):
            unit_CD = x_CD * r_C1
            share_CD = grad_CD * unit_CD
            grad_weight_D += share_CD.sum(0)
            mean_C1 = share_CD.mul_(weight_D).sum(-1, keepdim=True).div_(D)
            slope_CD = (grad_CD * weight_D).addcmul_(unit_CD, mean_C1, value=-1)
            torch.mul(slope_CD, r_C1, out=grad_x_CD)
        return grad_x_ND.view(grad_D.shape), grad_weight_D.to(weight_dtype), None


def _pieces(*tensors_ND: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all of them together, a piece at a time."""
    size = max(1, PIECE_ELEMENTS // max(1, tensors_ND[0].shape[-1]))
    return zip(*(tensor.split(size) for tensor in tensors_ND))
