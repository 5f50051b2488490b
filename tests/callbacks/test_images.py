"""The grid holds originals, reconstructions and growing pictures in order, one per level."""

from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from nextflow.callbacks.images import ReconstructionGrid

GRIDS = ((1, 1), (2, 2), (4, 4))


class _Tokenizer:
    """Decodes to a grey that is the number of scales used; -1 (black) to 0.5."""

    def encode(self, images: Tensor, grids) -> SimpleNamespace:
        return SimpleNamespace(target_codes_BN=torch.zeros(len(images), 21, dtype=torch.int64))

    def decode(self, codes: Tensor, grids, num_scales=None) -> Tensor:
        return torch.full((len(codes), 3, 8, 8), -1 + 0.5 * (num_scales or len(grids)))


def _batch(level: int) -> SimpleNamespace:
    return SimpleNamespace(images=torch.full((5, 3, 8, 8), 255, dtype=torch.uint8), grids=GRIDS, level=level)


def test_columns_are_original_reconstruction_and_scales():
    picture = ReconstructionGrid(num_images=2).picture(_Tokenizer(), _batch(8))
    assert picture.shape == (3, 2 * 10 + 2, 4 * 10 + 2)  # 2 rows and 4 columns of 8 pixels, 2 between
    centres = [picture[0, 6, 10 * column + 6].item() for column in range(4)]
    assert centres == [1.0, 0.75, 0.25, 0.5]


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
