"""The whole sequence of every row, laid out ahead by the layout of training; generation fills it in and reads it by windows.

A row is prompt and continuation as one document, its unknown codes and ids left open. A window is the slice of some rows that
one step feeds, again as `PackedRows`, so the transformer embeds it as it embeds a training batch: positions, resizing and
scale embeddings of generation cannot differ from training, because they are the same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nextflow.sequence.documents import Document, ImageSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import PackedRows, lay_out
from nextflow.sequence.scales import num_codes_of


class Script:
    """Rows of one document each, filled in as they are decoded.

    Args:
        documents: prompt and continuation; the codes of images still to be generated are None.
        vocabulary: ids of the transformer.
        layout: the layout that the transformer was trained with.
        device: where the rows lie.
    """

    def __init__(
        self, documents: Sequence[Document], vocabulary: Vocabulary, layout: LayoutConfig, device: torch.device
    ) -> None:
        rows = lay_out([[document] for document in documents], vocabulary, layout)
        self._input_position_M = rows.input_position_M  # a copy on the host, to find a window without waiting
        self.rows = rows.to(device)
        self.length = rows.ids_BL.shape[1]
        self.last_image_code: list[int] = []
        """For each row the index in `code_N` of the first code of its last image."""
        num_codes = 0
        for document in documents:
            counts = [num_codes_of(part.grids) for part in document.segments if isinstance(part, ImageSegment)]
            num_codes += sum(counts)
            self.last_image_code.append(num_codes - counts[-1] if counts else num_codes)

    def write_codes(self, index_M: Tensor, code_M: Tensor) -> None:
        """Fill in codes; index_M counts the codes of all rows."""
        self.rows.input_code_N[index_M] = code_M

    def write_ids(self, row_M: Tensor, column_M: Tensor, id_M: Tensor) -> None:
        """Fill in text ids."""
        self.rows.ids_BL[row_M, column_M] = id_M

    def window(self, rows: list[int], starts: list[int], counts: list[int]) -> PackedRows:
        """Positions `starts[b]` to `starts[b] + counts[b]` of row `rows[b]`, padded to the longest by repeating the last."""
        device = self.rows.ids_BL.device
        width = max(counts)
        start_B1 = torch.tensor(starts, device=device)[:, None]
        last_B1 = (start_B1 + torch.tensor(counts, device=device)[:, None] - 1).clamp(min=0)
        row_B1 = torch.tensor(rows, device=device)[:, None]
        column_BN = (start_B1 + torch.arange(width, device=device)).minimum(last_B1)

        # The cells of image blocks among them: a contiguous run of the sorted cells for each row.
        begin_B = torch.tensor([row * self.length + start for row, start in zip(rows, starts)])
        end_B = begin_B + torch.tensor(counts)
        run_B = torch.searchsorted(self._input_position_M, torch.stack([begin_B, end_B])).T.tolist()
        cell_M = torch.cat([torch.arange(first, last) for first, last in run_B])
        shifts = [b * width - begin for b, begin in enumerate(begin_B.tolist())]
        shift_M = torch.cat([torch.full((last - first,), shift) for (first, last), shift in zip(run_B, shifts)])
        position_M = (self._input_position_M[cell_M] + shift_M).to(device)
        tap_index_MT = self.rows.tap_index_MT[cell_M.to(device)]

        def pick(table_BL: Tensor) -> Tensor:
            return table_BL[row_B1, column_BN]

        full = self.rows
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return replace(
            full,
            ids_BL=pick(full.ids_BL),
            document_BL=pick(full.document_BL),
            block_BL=pick(full.block_BL),
            position_3BL=full.position_3BL[:, row_B1, column_BN],
            scale_BL=pick(full.scale_BL),
            num_scales_BL=pick(full.num_scales_BL),
            target_BL=pick(full.target_BL),
            weight_BL=pick(full.weight_BL),
            code_N=empty,
            code_position_N=empty,
            # Only codes that a cell of the window is made of: the others may not be known yet.
            input_code_N=full.input_code_N[tap_index_MT].flatten(),
            input_position_M=position_M,
            tap_index_MT=torch.arange(tap_index_MT.numel(), device=device).view_as(tap_index_MT),
            tap_weight_MT=full.tap_weight_MT[cell_M.to(device)],
        )
