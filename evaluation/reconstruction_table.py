"""The evaluation of a tokenizer as Markdown: one table of results, and one per split and level of where its bits go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from nextflow.evaluation.reconstruction_result import GroupResult, ReconstructionResult

_COLUMNS = ("split", "level", "images", "PSNR", "SSIM", "LPIPS", "rFID", "usage", "perplexity")
_SCALE_COLUMNS = ("scale", "codes", "bits", "effective bits", "PSNR after it", "gain", "usage")


def markdown(result: ReconstructionResult, checkpoint: str = "") -> str:
    """The tables; `docs/evaluation.md` explains their columns."""
    lines = ["# Reconstructions", ""]
    if checkpoint:
        lines += [f"Checkpoint: {checkpoint}", ""]
    rows = [
        (
            group.split,
            str(group.level),
            str(group.images),
            f"{group.psnr:.2f} dB",
            _number(group.ssim, ".3f"),
            _number(group.lpips, ".3f"),
            _number(group.rfid, ".2f"),
            f"{group.usage:.1%}",
            f"{group.perplexity:.0f}",
        )
        for group in result.groups
    ]
    lines += _table(_COLUMNS, rows)
    for group in result.groups:
        lines += [f"## Where the bits go: {group.split}, level {group.level}", ""]
        lines += _table(_SCALE_COLUMNS, _scale_rows(group))
    return "\n".join(lines)


def _scale_rows(group: GroupResult) -> Sequence[Sequence[str]]:
    before = [None, *(scale.psnr for scale in group.scales)]
    gains = [None if a is None or b is None else b - a for a, b in pairwise(before)]
    rows = [
        (
            str(number),
            f"{scale.codes:g}",
            f"{scale.bits:.0f}",
            f"{scale.effective_bits:.0f}",
            _number(scale.psnr, ".2f"),
            _number(gain, "+.2f"),
            f"{scale.usage:.1%}",
        )
        for number, (scale, gain) in enumerate(zip(group.scales, gains), start=1)
    ]
    codes, bits, effective = (
        sum(getattr(scale, name) for scale in group.scales) for name in ("codes", "bits", "effective_bits")
    )
    rows.append(("all", f"{codes:g}", f"{bits:.0f}", f"{effective:.0f}", f"{group.psnr:.2f}", "", f"{group.usage:.1%}"))
    return rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return [*body, ""]
