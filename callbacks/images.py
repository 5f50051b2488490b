"""Pictures in TensorBoard while training: what the tokenizer makes of images, and what the transformer draws for prompts."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from nextflow.evaluation.image_distances import to_bytes, to_unit
from nextflow.evaluation.pictures import Cell, draw_sheet


class ReconstructionGrid(L.Callback):
    """At the end of validation logs one row per image: image | all scales | the first 1, 2, ... scales alone.

    Needs a module with `tokenizer` (`encode`, `decode`, as `nextflow.models.tokenizer.model.Tokenizer`) and batches
    with `images`, `grids` and `level`. Nothing is logged without a TensorBoard logger. One sheet per level, from its
    first validation batch; above a column of fewer scales stands the grid of the last of them.

    Args:
        num_images: rows of each sheet.
        coarse_to_fine: whether to show the picture after each scale.
        tag: name in TensorBoard; the level is appended.
        side: pixels of a picture's longer side on the sheet.
    """

    def __init__(
        self, num_images: int = 8, coarse_to_fine: bool = True, tag: str = "val/reconstruction", side: int = 64
    ) -> None:
        self.num_images, self.coarse_to_fine, self.tag, self.side = num_images, coarse_to_fine, tag, side
        self._sheets: dict[int, Image.Image] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget the last validation."""
        self._sheets = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch of each level."""
        if batch.level not in self._sheets:  # on all ranks: a sharded tokenizer needs every one of them
            self._sheets[batch.level] = self.sheet(pl_module.tokenizer, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the sheets."""
        for level, sheet in self._sheets.items():
            show(trainer, f"{self.tag}/{level}", sheet)

    @torch.no_grad()
    def sheet(self, tokenizer: Any, batch: Any) -> Image.Image:
        """The sheet of one batch."""
        images_BCHW = batch.images[: self.num_images].float() / 127.5 - 1
        codes_BN = tokenizer.encode(images_BCHW, batch.grids).target_codes_BN
        header, columns = ["image", "all scales"], [images_BCHW, tokenizer.decode(codes_BN, batch.grids)]
        if self.coarse_to_fine:
            header += [f"to {height} x {width}" for height, width in batch.grids[:-1]]
            columns += [tokenizer.decode(codes_BN, batch.grids, num_scales=k) for k in range(1, len(batch.grids))]
        pixels = [to_bytes(to_unit(column_BCHW)).permute(0, 2, 3, 1).cpu().numpy() for column_BCHW in columns]
        rows = [[Cell(picture_HWC) for picture_HWC in row] for row in zip(*pixels)]
        return draw_sheet(rows, header=header, side=self.side)


class SampleGrid(L.Callback):
    """At the end of validation logs what the module answers to a few fixed prompts, each with its caption.

    Needs a module with `tokenizer` and `predict_step` on a PromptBatch: `PretrainingModule`. It draws as `predict` does, with
    the module's `sampling` and `guidance`, and always with the same noise, so that sheets differ by what was learnt alone.

    Args:
        prompts: gives the batches of prompts: a `PromptDataModule`.
        columns: pictures in a row.
        tag: name in TensorBoard.
        side: pixels of a picture's longer side on the sheet.
    """

    def __init__(
        self, prompts: L.LightningDataModule, columns: int = 8, tag: str = "val/samples", side: int = 96
    ) -> None:
        self.prompts, self.columns, self.tag, self.side = prompts, columns, tag, side

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw the pictures, on all ranks, as a sharded module needs every one of them."""
        pl_module.tokenizer.to(pl_module.device)  # no submodule: Lightning does not move it
        with trainer.precision_plugin.predict_step_context():
            answers = [
                answer
                for index, batch in enumerate(self.prompts.predict_dataloader())
                for answer in pl_module.predict_step(batch, index)
            ]
        cells = [Cell(answer.image.numpy(), answer.prompt) for answer in answers if answer.image is not None]
        rows = [cells[start : start + self.columns] for start in range(0, len(cells), self.columns)]
        show(trainer, self.tag, draw_sheet(rows, side=self.side, caption_lines=2))


def show(trainer: L.Trainer, tag: str, sheet: Image.Image) -> None:
    """Log a picture at the current step, where there is a TensorBoard logger."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, np.asarray(sheet), trainer.global_step, dataformats="HWC")
