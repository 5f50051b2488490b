"""What the evaluation of a tokenizer gives: results per split and level, per scale, and their names in TensorBoard."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

EVERY_SPLIT = ""
"""The split of a `GroupResult` over all splits of a level."""


class ScaleResult(NamedTuple):
    """One scale of a group's images."""

    codes: float
    """Codes of this scale, mean over images."""
    bits: float
    """codes * log2(codebook size): what they cost to write down."""
    effective_bits: float
    """codes * log2(perplexity): what they cost with a code length per entry that is fitted to this scale of this group."""
    usage: float
    perplexity: float
    psnr: float | None
    """Of the reconstruction from this and all coarser scales; None where it was not measured."""


class GroupResult(NamedTuple):
    """The images of one split and level. None: not measured."""

    split: str
    level: int
    images: int
    psnr: float
    ssim: float | None
    lpips: float | None
    rfid: float | None
    usage: float
    """Share of the codebook's entries that were used at least once."""
    perplexity: float
    """Number of entries that even use would need."""
    scales: tuple[ScaleResult, ...]


class ReconstructionResult(NamedTuple):
    """Results over all ranks."""

    groups: tuple[GroupResult, ...]
    """One per split and level."""
    levels: tuple[GroupResult, ...]
    """One per level, over its splits; rFID is None where there are several."""
    usage: Any
    """Use of the codebook over everything: share, perplexity, share_S, perplexity_S, error_semantic_S and error_pixel_S."""

    def logged(self, prefix: str) -> dict[str, float]:
        """Names and values for the logger.

        PREFIX/psnr (mean over levels), PREFIX/psnr/LEVEL, PREFIX/psnr/LEVEL/scale_03 (after scale 3), and
        PREFIX/psnr/LEVEL/SPLIT where a level has several splits; the same for ssim, lpips and rfid, which have no scales.
        The use of the codebook is `tokenizer/usage` and `tokenizer/usage/scale_03`; the same for perplexity.
        `tokenizer/error_pixel/scale_03` is how far entries are from what they stand for; the same for the semantic part.
        """
        values: dict[str, float] = {}
        several = len(self.groups) > len(self.levels)
        for name in ("psnr", "ssim", "lpips", "rfid"):
            of_level = {group.level: getattr(group, name) for group in self.levels}
            of_level = {level: value for level, value in of_level.items() if value is not None}
            values.update({f"{prefix}/{name}/{level}": value for level, value in of_level.items()})
            if of_level:
                values[f"{prefix}/{name}"] = sum(of_level.values()) / len(of_level)
            for group in self.groups if several else ():
                if getattr(group, name) is not None:
                    values[f"{prefix}/{name}/{group.level}/{group.split}"] = getattr(group, name)
        for group in self.levels:
            for number, scale in enumerate(group.scales, start=1):
                if scale.psnr is not None:
                    values[f"{prefix}/psnr/{group.level}/scale_{number:02d}"] = scale.psnr
        values["tokenizer/usage"] = float(self.usage.share)
        values["tokenizer/perplexity"] = float(self.usage.perplexity)
        for number, (share, perplexity) in enumerate(zip(self.usage.share_S, self.usage.perplexity_S), start=1):
            values[f"tokenizer/usage/scale_{number:02d}"] = float(share)
            values[f"tokenizer/perplexity/scale_{number:02d}"] = float(perplexity)
        for part in ("semantic", "pixel"):
            for number, error in enumerate(getattr(self.usage, f"error_{part}_S").tolist(), start=1):
                if not math.isnan(error):  # no such part, or no image of that many scales
                    values[f"tokenizer/error_{part}/scale_{number:02d}"] = error
        return values
