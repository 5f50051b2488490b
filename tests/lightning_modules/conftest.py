"""A tokenizer of toy size, its batches, and the folders and files that its stages start from."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torchvision.models.vgg import cfgs, make_layers
from transformers import Siglip2Config, Siglip2Model

from nextflow.datamodules.batches import ImageBatch
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.sequence.scales import ScaleSchedule
from nextflow.tests.lightning_modules.tiny_grpo import write_models

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8)


class Batches(torch.utils.data.Dataset):
    """Four batches of noise, of both levels in turn."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> ImageBatch:
        level = (16, 32)[index % 2]
        generator = torch.Generator().manual_seed(index)
        images = torch.randint(0, 256, (4, 3, level, level), dtype=torch.uint8, generator=generator)
        return ImageBatch(
            images_BCHW=images,
            captions=[""] * 4,
            keys=[f"{index}{letter}" for letter in "abcd"],
            names=["0.png"] * 4,
            records=[{"segments": [{"image": "0.png"}]}] * 4,
            level=level,
            aspect_ratio=1.0,
            grids=SCHEDULE.grids(level),
        )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> TokenizerConfig:
    return TokenizerConfig(
        schedule=SCHEDULE,
        codebook_size=32,
        semantic_dim=8,
        pixel_dim=4,
        pixel=PixelConfig(
            layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4
        ),
        semantic=SemanticConfig(  # of another size than the folder below, which counts
            width=8,
            mlp_width=8,
            num_layers=1,
            num_heads=2,
            num_patches=4,
            decoder_layers=1,
            decoder_width=16,
            decoder_heads=2,
        ),
        revive_interval=2,
        revive_below=0.5,
        usage_decay=0.5,
    )


@pytest.fixture(scope="session")
def siglip2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Siglip2Model of random weights."""
    folder = tmp_path_factory.mktemp("siglip2")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Siglip2Config(
        text_config={**tower, "vocab_size": 20, "bos_token_id": None, "eos_token_id": None},
        vision_config={**tower, "patch_size": 8, "num_patches": 4},
    )
    Siglip2Model(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights in the format of torchvision's VGG16."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(make_layers(cfgs["D"]).state_dict(prefix="features."), path)
    return str(path)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Trains a module on the batches, in four steps if not told otherwise."""

    def run(module: L.LightningModule, ckpt_path: str | None = None, **options) -> L.Trainer:
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(
            **{"max_steps": 4, "precision": "bf16-mixed", "accelerator": "cpu", "devices": 1, **options},
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture(scope="session")
def grpo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every GRPO run of `tiny_grpo` starts from."""
    folder = tmp_path_factory.mktemp("grpo")
    write_models(folder)
    return folder
