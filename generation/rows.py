"""Rows of decoding: each is one document, written piece by piece and fed by windows.

What a row writes (start, text ids, blocks of a picture, `<eoi>`) waits in `pending` until a step takes it as that row's window.
`Window` puts the windows of several rows side by side, in the fields by which the transformer embeds a training batch, so
positions, resizing and marks of scales come from the same layout as in training (`sequence.image_layout`).

Shapes: P positions of a piece, C its cells of image blocks, R rows of a step, N positions of the longest window, M cells of all
rows, T taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextflow.sequence.documents import Segment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig, image_layout
from nextflow.sequence.scales import Grid, num_codes_of


class _Piece(NamedTuple):
    """Positions that are fed together, on the host."""

    ids_P: np.ndarray
    position_3P: np.ndarray
    block_P: np.ndarray
    scale_P: np.ndarray
    num_scales: int
    is_cell_P: np.ndarray
    codes_K: Tensor | None = None
    """Codes of the picture, wherever they lie; those that the taps name are known when the piece is fed."""
    taps: tuple[np.ndarray, np.ndarray] | None = None
    """Index into the codes and weight, [C, T] each."""


class Row:
    """One document under way.

    Args:
        vocabulary: ids of the transformer.
        layout: the layout that it was trained with.
    """

    def __init__(self, vocabulary: Vocabulary, layout: LayoutConfig) -> None:
        self.vocabulary, self.layout = vocabulary, layout
        self.pending: list[_Piece] = []
        self._running = 0
        self._picture = 0
        self.write_ids([vocabulary.start_id])

    @property
    def num_pending(self) -> int:
        """Positions of the next window."""
        return sum(len(piece.ids_P) for piece in self.pending)

    def key(self) -> tuple:
        """Equal for rows whose next windows are equal."""
        parts: list[object] = []
        for piece in self.pending:
            parts += [piece.ids_P.tobytes(), piece.block_P.tobytes(), piece.position_3P.tobytes(), piece.num_scales]
            if piece.codes_K is not None:
                parts.append(piece.codes_K.cpu().numpy().tobytes())
        return tuple(parts)

    def write_segment(self, segment: Segment) -> None:
        """Write a text, or a picture whose codes are known."""
        if isinstance(segment, TextSegment):
            self.write_ids(segment.ids)
            return
        assert segment.codes is not None
        self.open_picture()
        self.write_scales(segment.grids, segment.codes, 0, len(segment.grids))
        self.close_picture(segment.grids, segment.codes)

    def write_ids(self, ids: Sequence[int]) -> None:
        """Write text ids."""
        ids_P = np.asarray(ids, dtype=np.int64)
        running_P = np.arange(self._running, self._running + len(ids_P))
        position_3P = np.broadcast_to(running_P.astype(np.float32), (3, len(ids_P)))
        nothing_P = np.zeros(len(ids_P), dtype=np.int64)
        self.pending.append(_Piece(ids_P, position_3P, running_P, nothing_P, 0, nothing_P.astype(bool)))
        self._running += len(ids_P)

    def open_picture(self) -> None:
        """A picture begins here: `write_scales` follows."""
        self._picture = self._running

    def write_scales(self, grids: tuple[Grid, ...], codes_K: Tensor, first: int, stop: int) -> None:
        """Write the blocks that predict the scales `first` to `stop` - 1, counted from 0; block 0 is `<boi>`."""
        self._write_cells(grids, codes_K, num_codes_of(grids[:first]), num_codes_of(grids[:stop]))
        self._running = self._picture + stop

    def close_picture(self, grids: tuple[Grid, ...], codes_K: Tensor) -> None:
        """Write what follows the last scale: its own codes where the layout feeds them, and `<eoi>`."""
        if self.layout.feed_last_scale:
            end = len(image_layout(grids, self.layout).block_P)
            self._write_cells(grids, codes_K, num_codes_of(grids), end)
            self._running += 1
        self.write_ids([self.vocabulary.eoi])

    def _write_cells(self, grids: tuple[Grid, ...], codes_K: Tensor, start: int, stop: int) -> None:
        layout = image_layout(grids, self.layout)
        part = slice(start, stop)
        block_P = layout.block_P[part] + self._picture
        spatial_2P = layout.spatial_2P[:, part] + self._picture * layout.moves_P[part]
        ids_P = np.zeros(stop - start, dtype=np.int64)
        is_cell_P = layout.block_P[part] > 0
        ids_P[~is_cell_P] = self.vocabulary.boi
        self.pending.append(
            _Piece(
                ids_P,
                np.concatenate([block_P[None], spatial_2P]).astype(np.float32),
                block_P,
                layout.scale_P[part],
                len(grids),
                is_cell_P,
                codes_K if is_cell_P.any() else None,
                (layout.tap_index_PT[part][is_cell_P], layout.tap_weight_PT[part][is_cell_P]),
            )
        )


@dataclass(frozen=True, kw_only=True)
class Window:
    """What some rows feed in one step, padded to the longest."""

    ids_BL: Tensor
    """int64 [R, N]"""
    position_3BL: Tensor
    """float32 [3, R, N]"""
    block_BL: Tensor
    """int64 [R, N], on the CPU."""
    scale_BL: Tensor
    num_scales_BL: Tensor
    input_code_N: Tensor
    """int64, codes of the pictures of all rows behind each other."""
    input_position_M: Tensor
    tap_index_MT: Tensor
    tap_weight_MT: Tensor
    counts: list[int]
    """Positions of each row that are not padding."""

    @classmethod
    def take(cls, rows: Sequence[Row], device: torch.device) -> Window:
        """The pending pieces of `rows`, which are then taken as fed."""
        counts = [row.num_pending for row in rows]
        shape = (len(rows), max(counts))
        ids, block, scale, num_scales = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        position = np.zeros((3, *shape), dtype=np.float32)
        codes: list[Tensor] = []
        cells: list[np.ndarray] = []
        taps: list[tuple[np.ndarray, np.ndarray]] = []
        num_codes = 0
        for place, row in enumerate(rows):
            start = 0
            for piece in row.pending:
                part = slice(start, start + len(piece.ids_P))
                ids[place, part], block[place, part], scale[place, part] = piece.ids_P, piece.block_P, piece.scale_P
                num_scales[place, part] = piece.num_scales
                position[:, place, part] = piece.position_3P
                if piece.codes_K is not None and piece.taps is not None:
                    cells.append(np.flatnonzero(piece.is_cell_P) + (place * shape[1] + start))
                    taps.append((piece.taps[0] + num_codes, piece.taps[1]))
                    codes.append(piece.codes_K.to(device))
                    num_codes += len(piece.codes_K)
                start = part.stop
            row.pending = []

        def moved(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        tap_index_MT, tap_weight_MT = _joined(taps)
        return cls(
            ids_BL=moved(ids),
            position_3BL=moved(position),
            block_BL=torch.from_numpy(block),
            scale_BL=moved(scale),
            num_scales_BL=moved(num_scales),
            input_code_N=torch.cat(codes) if codes else torch.zeros(0, dtype=torch.int64, device=device),
            input_position_M=moved(np.concatenate(cells) if cells else np.zeros(0, dtype=np.int64)),
            tap_index_MT=moved(tap_index_MT),
            tap_weight_MT=moved(tap_weight_MT),
            counts=counts,
        )


def _joined(taps: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Layouts that accumulate scales give pictures of more scales more taps: the others repeat their last with weight 0."""
    if not taps:
        return np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1), dtype=np.float32)
    missing = [max(index.shape[1] for index, _ in taps) - index.shape[1] for index, _ in taps]
    indices = [np.pad(index, ((0, 0), (0, more)), "edge") for (index, _), more in zip(taps, missing)]
    return np.concatenate(indices), np.concatenate(
        [np.pad(weight, ((0, 0), (0, more))) for (_, weight), more in zip(taps, missing)]
    )
