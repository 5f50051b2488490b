"""TensorBoard picture grid of the image tokenizer: originals, reconstructions, and how pictures grow over scales."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid


class ReconstructionGrid(L.Callback):
    """At the end of validation logs one row per image: original | reconstruction | the first 1, 2, ... scales alone.

    Needs a module with `tokenizer` (`encode`, `decode`, as `nextflow.models.tokenizer.model.Tokenizer`) and batches
    with `images`, `grids` and `level`. Nothing is logged without a TensorBoard logger. One grid per level, from its
    first validation batch.

    Args:
        num_images: rows of each grid.
        coarse_to_fine: whether to show the picture after each scale.
        tag: name in TensorBoard; the level is appended.
    """

    def __init__(self, num_images: int = 8, coarse_to_fine: bool = True, tag: str = "val/reconstruction") -> None:
        self.num_images, self.coarse_to_fine, self.tag = num_images, coarse_to_fine, tag
        self._grids: dict[int, Tensor] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._grids = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.level not in self._grids:  # on all ranks: a sharded tokenizer needs every one of them
            self._grids[batch.level] = self.picture(pl_module.tokenizer, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for level, grid_CHW in self._grids.items():
                    logger.experiment.add_image(f"{self.tag}/{level}", grid_CHW, trainer.global_step)

    @torch.no_grad()
    def picture(self, tokenizer: Any, batch: Any) -> Tensor:
        """The grid of one batch, [3, H, W] in [0, 1]."""
        images_BCHW = batch.images[: self.num_images].float() / 127.5 - 1
        codes_BN = tokenizer.encode(images_BCHW, batch.grids).target_codes_BN
        columns = [images_BCHW, tokenizer.decode(codes_BN, batch.grids)]
        if self.coarse_to_fine:
            columns += [tokenizer.decode(codes_BN, batch.grids, num_scales=k) for k in range(1, len(batch.grids))]
        rows_NCHW = torch.stack([column.float() for column in columns], dim=1).flatten(0, 1)
        return make_grid((rows_NCHW.cpu().clamp(-1, 1) + 1) / 2, nrow=len(columns), padding=2, pad_value=1.0)
