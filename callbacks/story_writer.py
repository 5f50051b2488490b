"""Writer of interleaved answers: stories of texts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from nextflow.callbacks.writers import gather_records, save_png, write_lines
from nextflow.evaluation.drawings import read_picture
from nextflow.evaluation.pictures import Cell, draw_sheet


class StoryWriter(BasePredictionWriter):
    """Writes OUTPUT/00000_0.png ... (story, picture), OUTPUT/stories.jsonl and OUTPUT/grid.png with a story in each row.

    stories.jsonl has one line per story, in the order of the prompts: index, prompt, seed, key, split, and parts, a list of
    {"text": ...} and {"image": file}.
    """

    def __init__(self, output: str, max_stories: int = 16) -> None:
        """
        Args:
            output: folder to write to.
            max_stories: rows of grid.png.
        """
        super().__init__(write_interval="batch")
        self.output, self.max_stories = Path(output), max_stories
        self._records: dict[int, dict[str, Any]] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the folder."""
        self.output.mkdir(parents=True, exist_ok=True)
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
        """Write the pictures of one batch."""
        for result in prediction:
            parts: list[dict[str, str]] = []
            for part in result.parts:
                if isinstance(part, str):
                    parts.append({"text": part})
                    continue
                file = f"{result.index:05d}_{sum('image' in other for other in parts)}.png"
                save_png(Image.fromarray(part.numpy()), self.output / file)
                parts.append({"image": file})
            record = {name: getattr(result, name) for name in ("index", "prompt", "seed", "key", "split")}
            self._records[result.index] = {**record, "parts": parts}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write stories.jsonl and grid.png, over all ranks. A picture's caption is the text in front of it."""
        records = [record for _, record in sorted(gather_records(self._records).items())]
        if not trainer.is_global_zero or not records:
            return
        write_lines(self.output / "stories.jsonl", records)
        rows = []
        for record in records[: self.max_stories]:
            row, said = [], record["prompt"]
            for part in record["parts"]:
                if "image" in part:
                    row.append(Cell(read_picture(self.output / part["image"]), said))
                said = part.get("text", "")
            rows += [row] if row else []
        if rows:
            save_png(draw_sheet(rows), self.output / "grid.png")
