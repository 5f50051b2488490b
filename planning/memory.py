"""Bytes on a device: what weights, gradients, optimiser, activations and caches take.

Activations are what autograd keeps from the forward pass, for attention kernels that keep neither scores nor masks (flash-attn,
FlexAttention). For each position and layer, with r bytes of the residual stream and a bytes of what is computed with:

    both norms            2 W r + 2 W a + 8        their inputs; their outputs, which the projections keep; two scales
    attention             (2 H + 3 G) D a          the whole of q, k, v, and rotated q, k
                          H D a + 4 H              the output, and one logarithm for each head
    MLP                   4 M a                    gate and up, silu(gate), the product

Not counted: the allocator's gaps, workspaces, the CUDA context, batches on their way (together often 1 to 3 GiB).

Shapes as in `sequence.flops`: W width, H query heads, G key/value heads, D head width, M MLP width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nextflow.planning.run import Run
from nextflow.sequence.flops import DecoderShape, Work


def activation_bytes(
    shape: DecoderShape,
    work: Work,
    *,
    code_dim: int,
    residual_bytes: int,
    compute_bytes: int,
    checkpointing: bool = False,
) -> float:
    """What the backward pass of one batch needs.

    Args:
        shape: the decoder's sizes.
        work: of the batch.
        code_dim: channels of a code vector.
        residual_bytes: of a number of the residual stream: 4 under autocast.
        compute_bytes: of a number that products take.
        checkpointing: only the input of each block is kept, and one block at a time is computed again.
    """
    s, r, a = shape, residual_bytes, compute_bytes
    norms = 2 * s.width * (r + a) + 8
    attention = (3 * s.num_heads + 3 * s.num_kv_heads) * s.head_dim * a + 4 * s.num_heads
    block = work.positions * (norms + attention + 4 * s.mlp_width * a)
    blocks = s.num_layers * work.positions * s.width * r + block if checkpointing else s.num_layers * block
    connector = work.cells * (code_dim + 2 * s.width) * a
    final_norm_and_head = work.positions * (s.width * r + 4) + work.targets * s.width * a
    return blocks + connector + final_norm_and_head


def cache_bytes(shape: DecoderShape, positions: int, *, compute_bytes: int) -> int:
    """Keys and values of one row of so many positions."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * positions * compute_bytes


def optimizer_bytes(make: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], notes: list[str]) -> int:
    """State of an optimiser, found by taking one step without data.

    Args:
        make: builds it from parameter groups.
        groups: of parameters on the meta device.
        notes: an optimiser whose step needs real numbers is noted here, and counts 0.
    """
    optimizer = make(groups)
    for group in optimizer.param_groups:
        for implementation in ("fused", "foreach"):  # both want real devices, and neither changes the state
            if implementation in group:
                group[implementation] = False
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except RuntimeError as error:  # what torch raises where tensors on meta would need numbers
        notes.append(
            f"the state of {type(optimizer).__name__} is missing in the bytes, its size cannot be known: {error}"
        )
        return 0
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def training_memory(
    run: Run,
    modules: list[nn.Module],
    *,
    optimizer: int,
    activations: float,
    whole_weights: int = 0,
    whole_gradients: int = 0,
    products: int = 0,
) -> dict[str, float]:
    """Bytes on each device while it trains.

    Args:
        run: strategy and precision.
        modules: all that is on the device, on meta.
        optimizer: bytes of the whole state, before it is split over shards.
        activations: bytes of the largest batch.
        whole_weights: parameters that FSDP2 gathers on every device at the same time.
        whole_gradients: gradients that are whole on every device at the same time, before FSDP2 sums and splits them.
        products: parameters that go through products, of which autocast keeps copies for the backward pass.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    weights = sum(parameter.numel() for parameter in parameters) * run.weight_bytes
    gradients = sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * run.weight_bytes
    memory: dict[str, float] = {
        "weights": weights / run.shards,
        "gradients": gradients / run.shards,
        "optimizer": optimizer / run.shards,
    }
    if run.ema:
        memory["ema"] = weights / run.shards
    if run.strategy == "ddp":
        memory["gradient_buckets"] = gradients
    if run.strategy == "fsdp2":
        memory["gathered_weights"] = whole_weights * run.gathered_bytes
        copied = run.reduced_bytes if run.reduced_bytes != run.gathered_bytes else 0
        memory["gathered_gradients"] = whole_gradients * (run.gathered_bytes + copied)
    if run.compute_bytes < run.gathered_bytes:
        memory["autocast_copies"] = products * run.compute_bytes
    memory["activations"] = activations
    return memory
