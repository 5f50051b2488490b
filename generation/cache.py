"""Keys and values of everything decoded so far, one preallocated buffer per layer, rows with lengths of their own.

A step begins with `begin`, which fixes where the new positions go and what they see; every layer then calls `append`.
Visibility is the law of `sequence.layout` for one document per row: a query sees a key iff block[key] <= block[query]. A step
of one block per row (a text token, a whole scale) needs no mask when the rows are equally long; a prompt of many blocks does.

Shapes: B rows, N new positions of the longest row, L cached positions of the longest row, C capacity, G key-value heads,
D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values. A layer's buffer is made by its first `append`, in the dtype of what comes.

    Args:
        batch: rows.
        layers: layers of the transformer.
        capacity: positions that the longest row may reach.
    """

    def __init__(self, *, batch: int, layers: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._block_BC = torch.zeros(batch, capacity + 1, dtype=torch.int64, device=device)
        self._lengths = [0] * batch  # on the host: slicing by the longest row must not wait for the device
        self._slot_BN: Tensor | None = None
        self._visible_BNL: Tensor | None = None
        self._window = (0, 0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Cached positions of each row."""
        return tuple(self._lengths)

    def begin(self, block_BN: Tensor, count_B: list[int]) -> None:
        """Open a step: row b adds its first `count_B[b]` positions, whose blocks are `block_BN[b]`; the others are padding.

        Raises ValueError when a row would outgrow the capacity.
        """
        device = self._block_BC.device
        num_new = block_BN.shape[1]
        end_B = [length + count for length, count in zip(self._lengths, count_B)]
        if max(end_B) > self.capacity:
            raise ValueError(f"a row needs {max(end_B)} positions of the KVCache; its capacity is {self.capacity}")
        even = len(set(self._lengths)) == 1 and all(count == num_new for count in count_B)
        start, end = self._lengths[0], max(end_B)
        self._window = (start, end)
        if even:
            self._slot_BN = None
            self._block_BC[:, start:end] = block_BN
        else:
            length_B1 = torch.tensor(self._lengths, device=device)[:, None]
            count_B1 = torch.tensor(count_B, device=device)[:, None]
            offset_N = torch.arange(num_new, device=device)
            self._slot_BN = torch.where(offset_N < count_B1, length_B1 + offset_N, self.capacity)
            self._block_BC.scatter_(1, self._slot_BN, block_BN)
        if even and bool((block_BN == block_BN[:, -1:]).all()):
            self._visible_BNL = None  # one block, appended to blocks that all come before it
        else:
            block_BL = self._block_BC[:, :end]
            filled_BL = torch.arange(end, device=device) < torch.tensor(end_B, device=device)[:, None]
            self._visible_BNL = filled_BL[:, None, :] & (block_BL[:, None, :] <= block_BN[:, :, None])
            # A row that adds nothing still needs something to look at: softmax over no key at all is NaN.
            self._visible_BNL[..., 0] |= ~self._visible_BNL.any(dim=-1)
        self._lengths = end_B

    def append(self, layer: int, k_BGND: Tensor, v_BGND: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write the step's keys and values of one layer.

        Returns:
            keys and values [B, G, L, D] of all positions so far, and the mask [B, N, L] of what each new position sees,
            None when it sees everything.
        """
        keys_BGCD = self._keys[layer] = self._buffer(self._keys[layer], k_BGND)
        values_BGCD = self._values[layer] = self._buffer(self._values[layer], v_BGND)
        start, end = self._window
        if self._slot_BN is None:
            keys_BGCD[:, :, start:end] = k_BGND
            values_BGCD[:, :, start:end] = v_BGND
        else:
            row_B1 = torch.arange(k_BGND.shape[0], device=k_BGND.device)[:, None]
            # Indexing the first and third axis puts them in front: the values are expected as [B, N, G, D].
            keys_BGCD[row_B1, :, self._slot_BN] = k_BGND.transpose(1, 2)
            values_BGCD[row_B1, :, self._slot_BN] = v_BGND.transpose(1, 2)
        return keys_BGCD[:, :, :end], values_BGCD[:, :, :end], self._visible_BNL

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but `rows` (in their new order), so that finished requests cost nothing more."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._block_BC.device)
        self._keys = [None if buffer is None else buffer.index_select(0, index) for buffer in self._keys]
        self._values = [None if buffer is None else buffer.index_select(0, index) for buffer in self._values]
        self._block_BC = self._block_BC.index_select(0, index)
        self._lengths = [self._lengths[row] for row in rows]
        self._slot_BN = self._visible_BNL = None

    def _buffer(self, buffer: Tensor | None, new_BGND: Tensor) -> Tensor:
        if buffer is not None:
            return buffer
        # Positions that only pad a block are written to the extra slot `capacity`, which nobody reads. Zeros, not empty:
        # a masked slot has weight 0, and 0 times uninitialised memory could be NaN.
        batch, kv_heads, _, head_dim = new_BGND.shape
        return new_BGND.new_zeros(batch, kv_heads, self.capacity + 1, head_dim)
