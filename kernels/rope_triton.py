"""`apply_rope` in Triton: one read and one write of x, any strides in front of the last axis. The op is in `rope.py`.

The gradient is the rotation by the opposite angles, so one kernel serves both passes.

Shapes: B batch, H heads, L positions, D head width, E = D/2 pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Heads that one program turns by the same cosines and sines."""


def apply_rope_triton(x_BHLD: Tensor, cos_BLE: Tensor, sin_BLE: Tensor) -> Tensor:
    """`apply_rope` on CUDA, or anywhere under Triton's interpreter."""
    return _Rope.apply(x_BHLD, cos_BLE.contiguous(), sin_BLE.contiguous())


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BHLD: Tensor, cos_BLE: Tensor, sin_BLE: Tensor):
        ctx.save_for_backward(cos_BLE, sin_BLE)
        return _rotate(x_BHLD, cos_BLE, sin_BLE, opposite=False)

    @staticmethod
    def backward(ctx, grad_BHLD: Tensor):
        return _rotate(grad_BHLD, *ctx.saved_tensors, opposite=True), None, None


def _rotate(x_BHLD: Tensor, cos_BLE: Tensor, sin_BLE: Tensor, *, opposite: bool) -> Tensor:
    if x_BHLD.stride(-1) != 1:
        x_BHLD = x_BHLD.contiguous()
    B, H, L, D = x_BHLD.shape
    y_BHLD = torch.empty_like(x_BHLD)
    if y_BHLD.numel():
        strides = *x_BHLD.stride()[:3], *y_BHLD.stride()[:3]
        sizes = {"HEADS": HEADS, "WIDTH": triton.next_power_of_2(D // 2)}
        # Triton starts on the current device, which need not be the tensors'.
        with torch.cuda.device_of(x_BHLD):
            grid = (B * L, triton.cdiv(H, HEADS))
            _kernel[grid](x_BHLD, cos_BLE, sin_BLE, y_BHLD, H, L, D // 2, *strides, OPPOSITE=opposite, **sizes)
    return y_BHLD


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    H,
    L,
    E,
    x_stride_b,
    x_stride_h,
    x_stride_l,
    y_stride_b,
    y_stride_h,
    y_stride_l,
    OPPOSITE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    b, n = position // L, position % L
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    e = tl.arange(0, WIDTH)[None, :]
    inside = (h < H) & (e < E)
    cos = tl.load(cos_ptr + position * E + e, mask=e < E, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * E + e, mask=e < E, other=0.0).to(tl.float32)
    if OPPOSITE:
        sin = -sin
    x_ptr += b * x_stride_b + n * x_stride_l + h * x_stride_h + e
    y_ptr += b * y_stride_b + n * y_stride_l + h * y_stride_h + e
    first = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + E, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + E, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)
