"""Keys and values of everything decoded so far, one buffer per layer, rows with lengths of their own.

A step begins with `begin`, which fixes where the new positions go and what they see; every layer then calls `append`. Rows
that take no part in a step cost nothing. Visibility is the law of `sequence.layout` for one document per row: what is cached
comes before everything new, and among new positions a query sees a key iff block[key] <= block[query]. So a step of one block
per row (a text id, a whole scale) needs no mask, or when rows are not equally long a mask of keys alone; the first step, whole
prompts, is attention within a batch of documents as in training.

Shapes: B rows, R rows of a step, N new positions of the longest, L cached positions of the longest, C capacity, G key-value
heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextflow.kernels.attention import Visibility


class KVCache:
    """Keys and values. A layer's buffer is made by its first `append`, in the dtype of what comes.

    Args:
        batch: rows.
        layers: layers of the transformer.
        capacity: positions that memory is taken for at once; more are added when a row outgrows it.
        device: where the buffers lie.
    """

    def __init__(self, *, batch: int, layers: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._capacity = capacity
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._lengths = [0] * batch  # on the host: slicing by the longest row must not wait for the device
        self._rows: Tensor | None = None
        self._slot_RN: Tensor | None = None
        self._window = (0, 0)
        self._visible: Visibility | Tensor | None = None
        self._fresh = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cached positions of each row."""
        return tuple(self._lengths)

    def begin(self, block_RN: Tensor, count_R: list[int], rows: list[int] | None = None) -> None:
        """Open a step: row `rows[r]` adds the first `count_R[r]` positions of `block_RN[r]`; the others are padding.

        Args:
            block_RN: int64, blocks of the new positions, on the CPU.
            count_R: new positions of each row, at least one.
            rows: which rows take part, in this order; all when None.
        """
        everyone = rows is None or rows == list(range(len(self._lengths)))
        rows = list(range(len(self._lengths))) if rows is None else rows
        start_R = [self._lengths[row] for row in rows]
        end_R = [start + count for start, count in zip(start_R, count_R)]
        num_new, end = block_RN.shape[1], max(end_R)
        even = len(set(start_R)) == 1 and min(count_R) == num_new
        self._window = (start_R[0], end)
        self._capacity = self._capacity if end <= self._capacity else max(end, self._capacity * 3 // 2)
        self._rows = None if everyone else self._tensor(rows)
        self._slot_RN = None if even and everyone else self._slots(start_R, count_R, num_new)

        new_RN = torch.arange(num_new) < torch.tensor(count_R)[:, None]
        one_block = bool(((block_RN == block_RN[:, :1]) | ~new_RN).all())
        self._fresh = max(start_R) == 0
        if even and one_block:
            self._visible = None
        elif self._fresh:
            self._visible = Visibility(torch.where(new_RN, 0, -1).to(self.device), block_RN.to(self.device))
        else:
            self._visible = self._mask(block_RN, start_R, end_R, one_block)
        for row, length in zip(rows, end_R):
            self._lengths[row] = length

    def append(self, layer: int, k_RGND: Tensor, v_RGND: Tensor) -> tuple[Tensor, Tensor, Visibility | Tensor | None]:
        """Write the step's keys and values of one layer.

        Returns:
            keys and values [R, G, L, D] of all positions so far, and who sees whom: the law, or a mask [R, N or 1, L], or None
            when every new position sees everything.
        """
        key_BGCD = self._keys[layer] = self._buffer(self._keys[layer], k_RGND)
        value_BGCD = self._values[layer] = self._buffer(self._values[layer], v_RGND)
        start, end = self._window
        if self._slot_RN is None:
            key_BGCD[:, :, start:end] = k_RGND
            value_BGCD[:, :, start:end] = v_RGND
        else:
            row_R1 = torch.arange(len(self._lengths), device=self.device) if self._rows is None else self._rows
            # Indexing the first and third axis puts them in front: the values are expected as [R, N, G, D].
            key_BGCD[row_R1[:, None], :, self._slot_RN] = k_RGND.transpose(1, 2)
            value_BGCD[row_R1[:, None], :, self._slot_RN] = v_RGND.transpose(1, 2)
        if self._fresh:
            return k_RGND, v_RGND, self._visible
        key_BGLD, value_BGLD = key_BGCD[:, :, :end], value_BGCD[:, :, :end]
        if self._rows is not None:
            key_BGLD, value_BGLD = key_BGLD.index_select(0, self._rows), value_BGLD.index_select(0, self._rows)
        return key_BGLD, value_BGLD, self._visible

    def select(self, rows: list[int]) -> None:
        """Keep `rows` alone, in their new order: drops finished rows, and copies one that is named more than once."""
        index = self._tensor(rows)
        self._keys = [None if buffer is None else buffer.index_select(0, index) for buffer in self._keys]
        self._values = [None if buffer is None else buffer.index_select(0, index) for buffer in self._values]
        self._lengths = [self._lengths[row] for row in rows]

    def _slots(self, start_R: list[int], count_R: list[int], num_new: int) -> Tensor:
        """Where each new position goes, [R, N]; padding goes to the slot behind the last one, which nobody reads."""
        offset_N = torch.arange(num_new)
        slot_RN = torch.tensor(start_R)[:, None] + offset_N
        return slot_RN.where(offset_N < torch.tensor(count_R)[:, None], self._capacity).to(self.device)

    def _mask(self, block_RN: Tensor, start_R: list[int], end_R: list[int], one_block: bool) -> Tensor:
        slot_L = torch.arange(max(end_R))
        if one_block:
            return (slot_L < torch.tensor(end_R)[:, None])[:, None].to(self.device)
        cached_R1L = (slot_L < torch.tensor(start_R)[:, None])[:, None]
        new_RNN = block_RN[:, None, :] <= block_RN[:, :, None]
        seen_RNL = cached_R1L.repeat(1, block_RN.shape[1], 1)
        for row, (start, end) in enumerate(zip(start_R, end_R)):
            seen_RNL[row, :, start:end] = new_RNN[row, :, : end - start]
        return seen_RNL.to(self.device)

    def _buffer(self, buffer: Tensor | None, new_RGND: Tensor) -> Tensor:
        if buffer is not None and buffer.shape[2] > self._capacity:
            return buffer
        # Zeros, not empty: a masked slot has weight 0, and 0 times uninitialised memory could be NaN.
        _, kv_heads, _, head_dim = new_RGND.shape
        larger = new_RGND.new_zeros(len(self._lengths), kv_heads, self._capacity + 1, head_dim)
        if buffer is not None:
            larger[:, :, : buffer.shape[2] - 1] = buffer[:, :, :-1]
        return larger

    def _tensor(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)
