"""Rotary embedding over three position axes (t, h, w), as Qwen2.5-VL splits them (paper section 2.2, equation 1).

The D/2 frequencies of a head are dealt to the axes in runs of `sections`: with (16, 24, 24) the 16 fastest turn with t,
the next 24 with h, the slowest 24 with w. Positions are real numbers, because cells of an image stand between integers.
Angles are always computed in float32; only the cosines and sines may be cast down.

    torch    two fused multiply-adds into one buffer per pass
    triton   one kernel per pass (`rope_triton.py`). CUDA.

Shapes: B batch, H heads, L positions, D head width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nextflow.kernels.implementation import resolve

Implementation = Literal["auto", "torch", "triton", "reference"]


class Rotation(NamedTuple):
    """Cosines and sines of all angles, one per pair of channels."""

    cos_BLE: Tensor
    sin_BLE: Tensor

    def to(self, dtype: torch.dtype) -> Rotation:
        """The same rotation in another dtype: cast once per forward, not once per layer."""
        return Rotation(self.cos_BLE.to(dtype), self.sin_BLE.to(dtype))


def rope_cos_sin(
    position_3BL: Tensor, head_dim: int, theta: float = 1e6, sections: tuple[int, ...] = (16, 24, 24)
) -> Rotation:
    """Cosines and sines of position * theta^(-2i/D), the axis of pair i chosen by `sections`.

    Args:
        position_3BL: positions on the axes (t, h, w), any real numbers.
        head_dim: D, width of a head; even.
        theta: base of the geometric series of frequencies.
        sections: pairs of channels given to each axis; they must sum to D/2.

    Returns:
        float32 cosines and sines [B, L, D/2].
    """
    if 2 * sum(sections) != head_dim:
        raise ValueError(
            f"rope_sections {sections} sum to {sum(sections)}; they must sum to head_dim / 2 = {head_dim / 2}"
        )
    device = position_3BL.device
    exponent_E = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency_E = 1.0 / (theta**exponent_E)
    angle_BLE = torch.cat(
        [
            position_BL.float()[..., None] * frequency_e
            for position_BL, frequency_e in zip(position_3BL, frequency_E.split(list(sections)))
        ],
        dim=-1,
    )
    return Rotation(angle_BLE.cos(), angle_BLE.sin())


def apply_rope(x_BHLD: Tensor, cos_BLE: Tensor, sin_BLE: Tensor, implementation: Implementation = "auto") -> Tensor:
    """Turn channel pairs (i, i + D/2) of every head by the angles of their position; the transpose is the gradient.

    Args:
        x_BHLD: queries or keys (any strides).
        cos_BLE: cosines [B, L, D/2] in the dtype of x.
        sin_BLE: sines, likewise.
        implementation: "auto", "torch", "triton" or "reference".

    Raises:
        ValueError: `implementation` cannot run here.
    """
    chosen = resolve("apply_rope", implementation, x_BHLD.device.type, anywhere="torch")
    if chosen == "reference":
        return apply_rope_ref(x_BHLD, cos_BLE, sin_BLE)
    if chosen == "triton":
        from nextflow.kernels.rope_triton import apply_rope_triton

        return apply_rope_triton(x_BHLD, cos_BLE, sin_BLE)
    return _Rope.apply(x_BHLD, cos_BLE, sin_BLE)


def apply_rope_ref(x_BHLD: Tensor, cos_BLE: Tensor, sin_BLE: Tensor, implementation: Implementation = "auto") -> Tensor:
    """The textbook form: x * cos + rotate_half(x) * sin, with the angles repeated over both halves."""
    cos_B1LD = torch.cat((cos_BLE, cos_BLE), dim=-1)[:, None]
    sin_B1LD = torch.cat((sin_BLE, sin_BLE), dim=-1)[:, None]
    a_BHLE, b_BHLE = x_BHLD.chunk(2, dim=-1)
    return x_BHLD * cos_B1LD + torch.cat((-b_BHLE, a_BHLE), dim=-1) * sin_B1LD


class _Rope(torch.autograd.Function):
    """One output buffer forward and one backward, instead of autograd's chain of eight elementwise ops."""

    @staticmethod
    def forward(ctx, x_BHLD: Tensor, cos_BLE: Tensor, sin_BLE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BLE, sin_BLE)
        return _rotate(x_BHLD, cos_BLE[:, None], sin_BLE[:, None])

    @staticmethod
    def backward(ctx, grad_BHLD: Tensor):
        cos_BLE, sin_BLE = ctx.saved_tensors
        return _rotate(grad_BHLD, cos_BLE[:, None], -sin_BLE[:, None]), None, None


def _rotate(x_BHLD: Tensor, cos_B1LE: Tensor, sin_B1LE: Tensor) -> Tensor:
    a_BHLE, b_BHLE = x_BHLD.chunk(2, dim=-1)
    y_BHLD = torch.empty_like(x_BHLD)
    y_BHLE, z_BHLE = y_BHLD.chunk(2, dim=-1)
    torch.mul(a_BHLE, cos_B1LE, out=y_BHLE).addcmul_(b_BHLE, sin_B1LE, value=-1)
    torch.mul(b_BHLE, cos_B1LE, out=z_BHLE).addcmul_(a_BHLE, sin_B1LE)
    return y_BHLD
