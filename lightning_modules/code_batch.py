"""The codes of a batch of images: what `predict` of the tokenizer gives to the writers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextflow.sequence.correction import CorrectedCodes
from nextflow.sequence.scales import Grid


@dataclass(frozen=True, kw_only=True)
class CodeBatch:
    """The codes of a batch of images, as `predict` returns them."""

    keys: list[str]
    """Key of each image's document."""
    names: list[str]
    """The image's file in its document, such as "0.png"."""
    records: list[dict[str, Any]]
    """Each image's document record (its KEY.json)."""
    codes_BN: Tensor
    """int64 on the CPU: flat, coarse to fine."""
    grids: tuple[Grid, ...]
    level: int
    aspect_ratio: float
    split: str
    corrected: CorrectedCodes | None = None
    """[B, N] on the CPU: codes to feed and to predict under self-correction, where it is on."""
    valid_size: tuple[int, int] | None = None
    """Height and width of the pictures where the rest is padding; None where there is none."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CodeBatch:
        """The batch itself: codes are on the CPU already, which is where Lightning moves predictions."""
        return self
