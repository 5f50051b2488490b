"""`rms_norm` in Triton: one read and one write of x forward, two reads and one write backward. The op is in `rms_norm.py`.

    y = x * r * w,   r = 1 / sqrt(mean(x^2) + eps)
    dx = r * (g w - x r * mean(g w x r)),   dw = sum over rows of g x r

Shapes: N rows, D width, P programs that share the rows in the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm_triton(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` of [..., D] on CUDA, or anywhere under Triton's interpreter."""
    return _RMSNorm.apply(x_D, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_D: Tensor, weight_D: Tensor, eps: float):
        x_ND, weight_D = x_D.reshape(-1, x_D.shape[-1]).contiguous(), weight_D.contiguous()
        N, D = x_ND.shape
        y_ND = torch.empty_like(x_ND)
        r_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
        width = triton.next_power_of_2(D)
        if N:
            # Triton starts on the current device, which need not be the tensors'.
            with torch.cuda.device_of(x_ND):
                _forward_kernel[(N,)](x_ND, weight_D, y_ND, r_N, D, eps, WIDTH=width, num_warps=_warps(width))
        ctx.save_for_backward(x_ND, weight_D, r_N)
        return y_ND.view_as(x_D)

    @staticmethod
    def backward(ctx, grad_D: Tensor):
        x_ND, weight_D, r_N = ctx.saved_tensors
        N, D = x_ND.shape
        grad_ND = grad_D.reshape(N, D).contiguous()
        grad_x_ND = torch.empty_like(x_ND)
        P = min(N, _programs(x_ND.device))
        partial_PD = torch.zeros(P, D, dtype=torch.float32, device=x_ND.device)
        width = triton.next_power_of_2(D)
        if N:
            with torch.cuda.device_of(x_ND):
                _backward_kernel[(P,)](
                    grad_ND, x_ND, weight_D, r_N, grad_x_ND, partial_PD, N, D, WIDTH=width, num_warps=_warps(width)
                )
        return grad_x_ND.view_as(grad_D), partial_PD.sum(0).to(weight_D.dtype), None


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, y_ptr, r_ptr, D, eps, WIDTH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < D
    x = tl.load(x_ptr + n * D + d, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * D + d, (x * r * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(r_ptr + n, r)


@triton.jit
def _backward_kernel(grad_ptr, x_ptr, weight_ptr, r_ptr, grad_x_ptr, partial_ptr, N, D, WIDTH: tl.constexpr):
    p = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    inside = d < D
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    partial = tl.zeros((WIDTH,), dtype=tl.float32)
    for row in range(p, N, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * D + d
        unit = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row)
        unit = unit * r
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        partial += grad * unit
        grad = grad * weight
        grad_x = r * (grad - unit * (tl.sum(grad * unit, axis=0) / D))
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + p * D + d, partial, mask=inside)


def _warps(width: int) -> int:
    return max(4, min(16, width // 512))


def _programs(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
