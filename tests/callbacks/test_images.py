"""What TensorBoard shows: images, reconstructions and growing pictures in order, a sheet per level; answers to prompts."""

import io
from types import SimpleNamespace

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from nextflow.callbacks.images import ReconstructionGrid, SampleGrid
from nextflow.datamodules.prompts import PromptDataModule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

GRIDS = ((1, 1), (2, 2), (4, 4))


class _Tokenizer:
    """Decodes to a grey that is the number of scales used; -1 (black) to 0.5."""

    def encode(self, images: Tensor, grids) -> SimpleNamespace:
        return SimpleNamespace(target_codes_BN=torch.zeros(len(images), 21, dtype=torch.int64))

    def decode(self, codes: Tensor, grids, num_scales=None) -> Tensor:
        return torch.full((len(codes), 3, 8, 8), -1 + 0.5 * (num_scales or len(grids)))


def _batch(level: int) -> SimpleNamespace:
    return SimpleNamespace(images=torch.full((5, 3, 8, 8), 255, dtype=torch.uint8), grids=GRIDS, level=level)


def test_columns_are_image_reconstruction_and_scales():
    sheet = np.asarray(ReconstructionGrid(num_images=2, side=48).sheet(_Tokenizer(), _batch(8)))
    top = sheet.shape[0] - 2 * 60  # a line of headers above 2 rows; 60 pixels a place
    assert sheet.shape[1] == 4 * 60 and sheet[:top].min() < 128
    centres = [[int(sheet[top + 60 * row + 30, 60 * column + 30, 0]) for column in range(4)] for row in range(2)]
    assert centres == [[255, 191, 64, 128]] * 2


def test_one_grid_per_level_reaches_tensorboard(tmp_path):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.tokenizer = _Tokenizer()

        def validation_step(self, batch, batch_idx):
            pass

    loader = torch.utils.data.DataLoader([_batch(8), _batch(16), _batch(8)], batch_size=None)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path),
        callbacks=[ReconstructionGrid(num_images=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(Module(), loader, verbose=False)
    trainer.logger.experiment.flush()
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["val/reconstruction/16", "val/reconstruction/8"]


class _Painter(L.LightningModule):
    """Paints each prompt in a grey of its number, and counts how often it was asked."""

    def __init__(self):
        super().__init__()
        self.tokenizer, self.asked = torch.nn.Identity(), 0

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        self.asked += 1
        assert not torch.is_grad_enabled()
        return [
            SimpleNamespace(prompt=prompt.text, image=torch.full((8, 8, 3), 10 * prompt.index, dtype=torch.uint8))
            for prompt in batch.prompts
        ]


def test_samples_stand_in_rows_in_the_order_of_their_prompts(tmp_path):
    train_text_tokenizer(["a red dog"], tmp_path / "text", size=260)
    prompts = PromptDataModule(
        text_tokenizer=str(tmp_path / "text"), level=256, prompts=["a", "a red dog", "c"], batch_size=2
    )
    module, loader = _Painter(), torch.utils.data.DataLoader([0], batch_size=None)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path),
        callbacks=[SampleGrid(prompts, columns=2, side=48)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, loader, verbose=False)
    trainer.logger.experiment.flush()
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    (event,) = events.Images("val/samples")
    sheet = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    step = sheet.shape[0] // 2
    assert module.asked == 2 and sheet.shape[1] == 2 * 60
    assert [int(sheet[step * row + 30, 60 * column + 30, 0]) for row, column in ((0, 0), (0, 1), (1, 0))] == [0, 10, 20]
    assert sheet[58:step, 60:].min() < 128  # its caption
