"""Sums of losses and correct predictions by scale, of one batch or of a whole validation set.

Shapes: N targets, R rows of the table: text, then scale 1 to the largest.
"""

from __future__ import annotations

import torch

from nextflow.kernels.linear_cross_entropy import LinearCrossEntropy
from nextflow.sequence.layout import IGNORE, PackedRows


class TokenMetrics:
    """A table of (loss, correct predictions, targets) by scale and the weighted loss. Losses in it are not weighted.

    Args:
        max_scales: most scales of an image.
    """

    def __init__(self, max_scales: int, device: torch.device) -> None:
        self.table_3R = torch.zeros(3, max_scales + 1, device=device)
        self.weighted = torch.zeros((), device=device)

    @torch.no_grad()
    def add(self, rows: PackedRows, tokens: LinearCrossEntropy) -> None:
        """Count a batch."""
        trained_N = rows.target_BL.flatten() != IGNORE
        values_3N = torch.stack((tokens.loss_N * trained_N, tokens.correct_N.float(), trained_N.float()))
        self.table_3R.index_add_(1, rows.target_scale_BL.flatten(), values_3N)
        self.weighted += (tokens.loss_N * rows.weight_BL.flatten()).sum()

    def over_ranks(self, all_reduce) -> TokenMetrics:
        """Sum the ranks' tables; `all_reduce` sums one tensor over all ranks."""
        self.table_3R, self.weighted = all_reduce(self.table_3R), all_reduce(self.weighted)
        return self

    def named(self, prefix: str) -> dict[str, float]:
        """TensorBoard values: `<prefix>/loss` (weighted, as trained), `loss_text`, `loss_image`, `loss_image/scale_07`,
        `accuracy/text`, `accuracy/image`, `accuracy/scale_07`. Kinds without targets are left out."""
        table = self.table_3R.double().cpu()
        groups = {"text": table[:, 0], "image": table[:, 1:].sum(1)}
        values = {f"{prefix}/loss": float(self.weighted) / max(1.0, float(table[2].sum()))}
        for name, (loss, correct, count) in groups.items():
            if count:
                values[f"{prefix}/loss_{name}"] = float(loss / count)
                values[f"{prefix}/accuracy/{name}"] = float(correct / count)
        for scale in range(1, table.shape[1]):
            loss, correct, count = table[:, scale]
            if count:
                values[f"{prefix}/loss_image/scale_{scale:02d}"] = float(loss / count)
                values[f"{prefix}/accuracy/scale_{scale:02d}"] = float(correct / count)
        return values
