"""Report of `test` on a tokenizer: a table on the screen and in a file, and pictures of its worst and best reconstructions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from nextflow.evaluation.image_distances import psnr, to_bytes, to_unit
from nextflow.evaluation.pictures import Cell, draw_sheet
from nextflow.evaluation.reconstruction import Reconstructions
from nextflow.evaluation.reconstruction_result import GroupResult
from nextflow.evaluation.reconstruction_table import markdown

_LONGEST_KEY = 19
"""Characters of a key that fit under a picture of 128 pixels."""


class ReconstructionReport(L.Callback):
    """Prints a table at the end of `test`, and writes it with pictures into the folder OUTPUT.

        table.md              results per split and level, and where the bits go (`docs/evaluation.md`)
        metrics.json          the same numbers, all digits, and which images are the worst and the best
        contact_sheet.png     the worst and the best reconstructions of each split and level beside their images
        coarse_to_fine.png    the first few images of each split and level as they are after 1, 2, ... scales

    Needs a module with `tokenizer` (`decode`, as `nextflow.models.tokenizer.model.Tokenizer`), `metrics.result` (a
    `ReconstructionResult`) and a `test_step` that returns `Reconstructions`. Keeps no more pictures than it will show.

    Args:
        output: folder to write to.
        num_extremes: worst, and best, images of each split and level.
        num_strips: images of each split and level in coarse_to_fine.png.
        side: pixels of a picture's longer side on the sheets.
    """

    def __init__(self, output: str, num_extremes: int = 6, num_strips: int = 4, side: int = 128) -> None:
        if num_extremes < 1 or num_strips < 0 or side < 1:
            raise ValueError("ReconstructionReport: num_extremes and side must be at least 1, num_strips at least 0")
        self.output, self.num_extremes, self.num_strips, self.side = Path(output), num_extremes, num_strips, side
        self._groups: dict[tuple[str, int], _Group] = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run."""
        self._groups = {}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what is worse or better than what was kept so far."""
        done: Reconstructions = outputs
        group = self._groups.setdefault((done.split, done.level), _Group([], [], []))
        order = done.psnr_B.argsort().tolist()
        for row in {*order[: self.num_extremes], *order[-self.num_extremes :]}:
            pair = _Pair(
                float(done.psnr_B[row]), done.keys[row], _pixels(done.images_BCHW[row]), _pixels(done.decoded_BCHW[row])
            )
            group.worst.append(pair)
            group.best.append(pair)
        self._cut(group)
        missing = self.num_strips - len(group.strips)
        if missing > 0:  # on all ranks: a sharded decoder needs them all
            group.strips.extend(_strips(pl_module, done, missing))

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Bring the ranks' pictures together and write everything."""
        groups: dict[tuple[str, int], _Group] = {}
        for part in _over_ranks(self._groups):
            for name, group in part.items():
                together = groups.setdefault(name, _Group([], [], []))
                together.worst.extend(group.worst)
                together.best.extend(group.best)
                together.strips.extend(group.strips)
        self._groups = {}
        result = pl_module.metrics.result
        if not trainer.is_global_zero or not groups:
            return
        for group in groups.values():
            self._cut(group)
            del group.strips[self.num_strips :]
        self.output.mkdir(parents=True, exist_ok=True)
        checkpoint = str(trainer.ckpt_path or "")
        table = markdown(result, checkpoint)
        _write(self.output / "table.md", lambda path: path.write_text(table, encoding="utf-8"))
        plain = [_plain(group, groups[group.split, group.level]) for group in result.groups]
        numbers = {"checkpoint": checkpoint, "groups": plain}
        _write(self.output / "metrics.json", lambda path: path.write_text(json.dumps(numbers, indent=1) + "\n"))
        rows = [row for name, group in sorted(groups.items()) for row in self._extremes(name, group)]
        header = ("", *("image", "reconstruction") * max(len(row) // 2 for row in rows))
        sheet = draw_sheet(rows, header=header, side=self.side, caption_lines=1)
        _write(self.output / "contact_sheet.png", lambda path: sheet.save(path, format="PNG"))
        rows = [row for name, group in sorted(groups.items()) for row in _strip_rows(name, group)]
        if rows:
            strips = draw_sheet(rows, side=self.side, caption_lines=1)
            _write(self.output / "coarse_to_fine.png", lambda path: strips.save(path, format="PNG"))
        Console().print(Markdown(table))
        Console().print(f"Written to {self.output}: table.md, metrics.json, contact_sheet.png, coarse_to_fine.png")

    def _cut(self, group: _Group) -> None:
        """Leave the few worst and best; an image that two ranks saw, to have equally many, is shown once."""
        for pairs, sign in ((group.worst, 1), (group.best, -1)):
            unique = {(pair.psnr, pair.key): pair for pair in pairs}
            pairs[:] = sorted(unique.values(), key=lambda pair: (sign * pair.psnr, pair.key))[: self.num_extremes]

    def _extremes(self, name: tuple[str, int], group: _Group) -> list[list[Cell]]:
        rows = []
        for title, pairs in (("worst", group.worst), ("best", group.best)):
            row = [Cell(None, f"{name[0]}, level {name[1]}: {title}")]
            for pair in pairs:
                row += [Cell(pair.image_HWC, _short(pair.key)), Cell(pair.decoded_HWC, f"{pair.psnr:.2f} dB")]
            rows.append(row)
        return rows


class _Pair(NamedTuple):
    psnr: float
    key: str
    image_HWC: np.ndarray
    decoded_HWC: np.ndarray


class _Strip(NamedTuple):
    key: str
    image_HWC: np.ndarray
    scales: list[np.ndarray]
    """After 1, 2, ... scales."""
    captions: list[str]
    """Of each scale: its grid, and the PSNR after it."""


class _Group(NamedTuple):
    """Pictures of one split and level."""

    worst: list[_Pair]
    best: list[_Pair]
    strips: list[_Strip]


@torch.no_grad()
def _strips(module: Any, done: Reconstructions, count: int) -> list[_Strip]:
    """The first images of a batch after each scale."""
    images_BCHW = done.images_BCHW[:count]
    height, width = images_BCHW.shape[-2:]
    strips = [_Strip(key, _pixels(image), [], []) for key, image in zip(done.keys, images_BCHW)]
    for num_scales, grid in enumerate(done.grids, start=1):
        decoded_BCHW = module.tokenizer.decode(done.codes_BN[:count], done.grids, num_scales)[:, :, :height, :width]
        unit_BCHW = to_unit(decoded_BCHW)
        psnr_B = psnr(unit_BCHW, images_BCHW.float() / 255).tolist()
        for strip, image, value in zip(strips, to_bytes(unit_BCHW), psnr_B):
            strip.scales.append(_pixels(image))
            strip.captions.append(f"{grid[0]} x {grid[1]}, {value:.2f} dB")
    return strips


def _strip_rows(name: tuple[str, int], group: _Group) -> list[list[Cell]]:
    rows = []
    for strip in group.strips:
        row = [Cell(None, f"{name[0]}, level {name[1]}"), Cell(strip.image_HWC, _short(strip.key))]
        row += [Cell(pixels, caption) for pixels, caption in zip(strip.scales, strip.captions)]
        rows.append(row)
    return rows


def _short(key: str) -> str:
    return key if len(key) <= _LONGEST_KEY else f"{key[:6]}...{key[9 - _LONGEST_KEY :]}"


def _plain(result: GroupResult, group: _Group) -> dict[str, Any]:
    """For JSON."""
    extremes = {
        name: [{"key": pair.key, "psnr": pair.psnr} for pair in pairs]
        for name, pairs in (("worst", group.worst), ("best", group.best))
    }
    return {**result._asdict(), "scales": [scale._asdict() for scale in result.scales], **extremes}


def _pixels(image_CHW: Tensor) -> np.ndarray:
    return image_CHW.permute(1, 2, 0).cpu().numpy().copy()


def _over_ranks(groups: dict[tuple[str, int], _Group]) -> list[dict[tuple[str, int], _Group]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [groups]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, groups)
    return parts


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Beside and then into place, so that a file that exists is complete."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
