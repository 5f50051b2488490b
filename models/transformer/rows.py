"""The rows of a parameter that this process holds: all of them, or one shard (FSDP2 splits the first axis).

Weights are drawn and read row by row, so that no process ever holds more of a sharded model than its share.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_DRAWN_TOGETHER = 1024
"""Rows that share a seed."""


class Rows(Protocol):
    """What can be read row by row: a tensor, or one inside a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        ...

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows."""
        ...


class LocalRows(NamedTuple):
    """The part of a tensor that is here, to be read or written in place."""

    values: Tensor
    """[n, ...]."""
    first: int
    """Number of its first row in the whole tensor."""


def local_rows(tensor: Tensor) -> LocalRows:
    """The rows that this process holds. Raises ValueError when the tensor is split along another axis than the first."""
    if not isinstance(tensor, DTensor):
        return LocalRows(tensor, 0)
    if any(placement not in (Shard(0), Replicate()) for placement in tensor.placements):
        raise ValueError(f"parameters must be sharded along their first axis, not {tensor.placements}")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return LocalRows(tensor.to_local(), offset[0])


@torch.no_grad()
def copy_rows(tensor: Tensor, source: Rows) -> None:
    """Fills the first rows of a tensor, as many as the source has; of a sharded one the rows that are here."""
    values, first = local_rows(tensor)
    end = min(first + len(values), source.shape[0])
    if first < end:
        values[: end - first].copy_(source[first:end])


@torch.no_grad()
def draw_rows(tensor: Tensor, std: float, seed: int, name: str) -> None:
    """Fills a tensor with N(0, std), a function of seed and name alone: sharded over any number of ranks, it is the same."""
    values, first = local_rows(tensor)
    for start in range(first - first % _DRAWN_TOGETHER, first + len(values), _DRAWN_TOGETHER):
        stop = min(start + _DRAWN_TOGETHER, tensor.shape[0])
        digest = hashlib.blake2b(f"{seed} {name} {start}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        # In float32 and on the CPU, whatever the weights are: devices draw differently.
        drawn = torch.empty(stop - start, *tensor.shape[1:], dtype=torch.float32, device="cpu")
        drawn.normal_(std=std, generator=generator)
        here = slice(max(start, first), min(stop, first + len(values)))
        values[here.start - first : here.stop - first].copy_(drawn[here.start - start : here.stop - start])
