"""Writers of what `predict` gives: generated pictures, captions, and a tokenizer's reconstructions.

Predictions are met by their attributes (`generation.requests.Generated`; `CodeBatch` of the tokenizer's module).
Every file is written aside and moved into place, so that a file that exists is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nextflow.evaluation.drawings import caption_of, read_picture
from nextflow.evaluation.pictures import Cell, draw_sheet


class _PictureFolder(BasePredictionWriter):
    """Numbered pictures, samples.jsonl with a line for each, and grid.png."""

    def __init__(self, output: str, columns: int = 8, max_pictures: int = 64) -> None:
        """
        Args:
            output: folder to write to.
            columns: pictures in a row of grid.png.
            max_pictures: pictures in grid.png.
        """
        super().__init__(write_interval="batch")
        self.output, self.columns, self.max_pictures = Path(output), columns, max_pictures
        self._records: dict[int, dict[str, Any]] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the folder."""
        self.output.mkdir(parents=True, exist_ok=True)
        self._records = {}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write samples.jsonl and grid.png, in the order of the numbers, over all ranks."""
        records = [record for _, record in sorted(gather_records(self._records).items())]
        if not trainer.is_global_zero or not records:
            return
        write_lines(self.output / "samples.jsonl", records)
        shown = records[: self.max_pictures]
        cells = [Cell(read_picture(self.output / record["file"]), record["prompt"]) for record in shown]
        rows = [cells[start : start + self.columns] for start in range(0, len(cells), self.columns)]
        save_png(draw_sheet(rows), self.output / "grid.png")

    def _add(self, index: int, pixels_HWC: np.ndarray, record: dict[str, Any]) -> None:
        """Write one picture, with its line of samples.jsonl as a text chunk inside."""
        record = {"file": f"{index:05d}.png", **record}
        self._records[index] = record
        info = PngInfo()
        info.add_itxt("nextflow", json.dumps(record, ensure_ascii=False))
        save_png(Image.fromarray(pixels_HWC), self.output / record["file"], info)


class ImageWriter(_PictureFolder):
    """Writes generated pictures as OUTPUT/00000.png ..., OUTPUT/samples.jsonl and OUTPUT/grid.png.

    samples.jsonl has one line per picture, in the order of the prompts: file, prompt, seed, level, aspect_ratio, key, split.
    Predictions without an image are left alone.
    """

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[Any],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch."""
        for result in prediction:
            if result.image is None:
                continue
            names = ("prompt", "seed", "level", "aspect_ratio", "key", "split")
            self._add(result.index, result.image.numpy(), {name: getattr(result, name) for name in names})


class ReconstructionWriter(_PictureFolder):
    """Writes what the tokenizer makes of its own codes as OUTPUT/00000.png ..., OUTPUT/samples.jsonl and OUTPUT/grid.png.

    For `predict` of a TokenizerModule. Padding is cut off. samples.jsonl has one line per picture: file, prompt (its caption),
    key, level, aspect_ratio. Pictures are numbered as they come, so on several ranks they interleave.
    """

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Decode and write the pictures of one batch."""
        tokenizer: Any = pl_module.tokenizer
        with torch.no_grad():
            image_BCHW = tokenizer.decode(prediction.codes_BN.to(pl_module.device), prediction.grids)
        if prediction.valid_size is not None:
            height, width = prediction.valid_size
            image_BCHW = image_BCHW[:, :, :height, :width]
        pixels_BHWC = ((image_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        for key, document, pixels_HWC in zip(prediction.keys, prediction.records, pixels_BHWC.cpu().numpy()):
            index = len(self._records) * trainer.world_size + trainer.global_rank
            line = {"prompt": caption_of(document), "key": key, "level": prediction.level}
            self._add(index, pixels_HWC, {**line, "aspect_ratio": prediction.aspect_ratio})


class CaptionWriter(BasePredictionWriter):
    """Writes generated texts to one JSON-lines file: index, key, split, reference, caption, in the order of the prompts.

    Predictions without a text are left alone.
    """

    def __init__(self, output: str) -> None:
        """
        Args:
            output: the file, such as runs/quickstart/caption/captions.jsonl.
        """
        super().__init__(write_interval="batch")
        self.output = Path(output)
        self._records: dict[int, dict[str, Any]] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run."""
        self._records = {}

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[Any],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the texts of one batch."""
        for result in prediction:
            if result.text is not None:
                names = {"key": result.key, "split": result.split, "reference": result.prompt, "caption": result.text}
                self._records[result.index] = {"index": result.index, **names}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file, over all ranks."""
        records = gather_records(self._records)
        if trainer.is_global_zero:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            write_lines(self.output, [record for _, record in sorted(records.items())])


def gather_records(records: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Those of all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return records
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, records)  # also waits until all have written their pictures
    return {index: record for part in parts for index, record in part.items()}


def save_png(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write aside and move into place."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines, written aside and moved into place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)
