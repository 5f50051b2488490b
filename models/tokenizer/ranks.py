"""The processes of a distributed run as plain torch sees them; every function is the identity in a run of one process.

All ranks have to call each function alike, or the run waits for ever.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, written into `tensor`. Exact where at most one of them is not 0."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum of all ranks' tensors, written into `tensor`."""
    if num_ranks() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """[R, ...]: the tensors of all ranks, which have one shape."""
    if num_ranks() == 1:
        return tensor[None]
    tensors = [torch.empty_like(tensor) for _ in range(num_ranks())]
    dist.all_gather(tensors, tensor.contiguous())
    return torch.stack(tensors)
