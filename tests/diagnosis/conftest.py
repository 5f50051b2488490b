"""Runs to examine: real trainings of a tokenizer of toy size on coloured squares, and synthetic curves in event files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from nextflow.diagnosis.finding import Finding, Missing
from nextflow.diagnosis.run import TrainingRun, read_run

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 120
  max_epochs: -1
  val_check_interval: 30
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: FOLDER, name: tokenizer, version: ""}
  callbacks:
    - class_path: nextflow.callbacks.last_checkpoint.LastCheckpoint
      init_args: {every_n_train_steps: 50}
    - class_path: nextflow.callbacks.metrics_writer.MetricsWriter
    - class_path: nextflow.callbacks.scale_dropout.ScaleDropout
      init_args: {share: 0.5, probability: 0.1}
model:
  class_path: nextflow.lightning_modules.tokenizer.TokenizerModule
  init_args:
    stage: pixel
    tokenizer:
      schedule: {sides: [1, 2, 4], levels: {32: 3}, stride: 8}
      codebook_size: 16
      pixel_dim: 4
      semantic: null
      pixel: {layout: patchified, stem: 4, width: 16, multipliers: [1, 2], num_blocks: 1, latent_width: 32, groups: 4}
      revive_interval: 5
      revive_below: 0.1
      usage_decay: 0.9
    losses: {mse: 1.0, l1: 0.2, semantic: 0.0, quantizer: 1.0, residual: 0.25}
    warmup_steps: 5
    generator_optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 4.0e-3, weight_decay: 0.0}
data:
  class_path: nextflow.datamodules.image_folder.ImageFolderDataModule
  init_args:
    folders: {train: FOLDER/images, validation: FOLDER/images}
    levels: [32]
    batch_size: 8
    schedule: {sides: [1, 2, 4], levels: {32: 3}, stride: 8}
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folder `images`: a bright square on a dark ground each."""
    folder = tmp_path_factory.mktemp("squares")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(24):
        picture = np.full((32, 32, 3), generator.integers(0, 90, 3), dtype=np.uint8)
        row, column, side = (int(generator.integers(low, 16)) for low in (0, 0, 8))
        picture[row : row + side, column : column + side] = generator.integers(120, 256, 3)
        Image.fromarray(picture).save(folder / "images" / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def train(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`train("--model.warmup_steps=9", ...)` trains the toy tokenizer by the command line and returns the run's folder."""
    from nextflow.main import cli

    def run(*arguments: str, folder: Path | None = None) -> Path:
        folder = folder or tmp_path_factory.mktemp("run")
        config = folder / "toy.yaml"
        config.write_text(CONFIG.replace("FOLDER/images", str(images / "images")).replace("FOLDER", str(folder)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["main.py"])  # Lightning warns of pytest's own
            cli(["fit", "-c", str(config), *arguments])
        return folder / "tokenizer"

    return run


@pytest.fixture(scope="session")
def healthy(train: Callable[..., Path]) -> Path:
    """A run as it should be."""
    return train()


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., TrainingRun]:
    """`drawn({"train/loss": values}, config)` is the run that logged these values, one each step, into a folder of its own."""

    def run(curves: Mapping[str, Sequence[float]], config: Mapping[str, Any] | None = None) -> TrainingRun:
        folder = Path(mkdtemp(dir=tmp_path))
        writer = SummaryWriter(folder)
        for name, values in ({"train/loss": [1.0]} | dict(curves)).items():
            for step, value in enumerate(values):
                writer.add_scalar(name, value, step)
        writer.close()
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(config or {})))
        found = read_run(folder)
        assert found is not None
        return found

    return run


@pytest.fixture(scope="session")
def findings() -> Callable[[Iterable[Finding | Missing]], dict[str, Finding]]:
    """What checks found, by what it is about."""
    return lambda said: {one.about: one for one in said if isinstance(one, Finding)}


@pytest.fixture(scope="session")
def missing() -> Callable[[Iterable[Finding | Missing]], list[str]]:
    """What checks could not see."""
    return lambda said: [one.what for one in said if isinstance(one, Missing)]
