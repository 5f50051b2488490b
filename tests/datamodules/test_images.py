"""The tokenizer trains in buckets of level and ratio, and is evaluated at native sizes of which padding does not count."""

import lightning as L
import pytest
import torch
from PIL import Image

from nextflow.callbacks.writers import ReconstructionWriter
from nextflow.datamodules.image_folder import ImageFolderDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.pixels import decode_image
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.losses import LossWeights
from nextflow.models.tokenizer.native import decode_images, encode_images

SEMANTIC = SemanticConfig(
    width=16,
    mlp_width=32,
    num_layers=1,
    num_heads=2,
    num_patches=16,
    decoder_layers=1,
    decoder_width=16,
    decoder_heads=2,
)
PIXEL = PixelConfig(layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4)


class Recorder(L.Callback):
    """Notes the buckets that training and validation see."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.trained.append((batch.level, batch.aspect_ratio, tuple(batch.images.shape[2:])))

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_index, dataloader_index=0):
        self.validated.append((batch.level, batch.aspect_ratio, tuple(batch.images.shape[2:])))


def make_module(schedule):
    config = TokenizerConfig(
        schedule=schedule, codebook_size=32, semantic_dim=8, pixel_dim=4, semantic=SEMANTIC, pixel=PIXEL
    )
    return TokenizerModule(config, stage="joint", losses=LossWeights(semantic=0.0))


def make_trainer(folder, callbacks=(), **options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@pytest.mark.parametrize("kind", ["shards", "folders"])
def test_training_in_buckets_of_level_and_ratio(shapes, tmp_path, kind):
    options = {"levels": [32, 64], "batch_size": 3, "schedule": shapes.schedule, "horizontal_flip": True}
    if kind == "shards":
        data = ImageDataModule(shards=shapes.documents, **options)
    else:
        tall = tmp_path / "train"  # the wide pictures of the data set turned: two more buckets
        tall.mkdir()
        for path in sorted((shapes.root / "folders" / "train").iterdir()):
            with Image.open(path) as image:
                image.transpose(Image.Transpose.ROTATE_90).save(tall / path.name)
        data = ImageFolderDataModule(folders={**shapes.folders, "train": str(tall)}, **options)
    recorder, module = Recorder(), make_module(shapes.schedule)
    before = module.tokenizer.pixel_encoder.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    trainer = make_trainer(tmp_path, [recorder], max_steps=16, val_check_interval=16, check_val_every_n_epoch=None)
    trainer.fit(module, datamodule=data)
    long_side = 0.25 if kind == "shards" else 4.0
    expected = {
        (level, ratio, shapes.schedule.pixels(level, ratio)) for level in (32, 64) for ratio in (1.0, long_side)
    }
    assert set(recorder.trained) == expected and len(recorder.trained) == 16
    assert {bucket[:2] for bucket in recorder.validated} == {(32, 0.25), (32, 1.0), (64, 0.25), (64, 1.0)}
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert {"val/psnr", "val/psnr/32", "val/psnr/64"} <= set(trainer.callback_metrics)
    assert any(
        not torch.equal(value, before[name]) for name, value in module.tokenizer.pixel_encoder.state_dict().items()
    )


def test_native_evaluation_is_of_the_pictures_alone(shapes, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(61, 44), (33, 70), (61, 44), (40, 40), (33, 70), (35, 38)]):
        noise_CHW = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(number))
        picture = Image.fromarray((noise_CHW.permute(1, 2, 0) * 255).byte().numpy())
        picture.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    module = make_module(shapes.schedule)
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(
        module, datamodule=ImageDataModule(shards=shapes.documents, levels=[32], schedule=shapes.schedule, batch_size=4)
    )
    data = ImageFolderDataModule(
        folders={"test": str(folder)}, schedule=shapes.schedule, resolution="native", test_splits=["test"], batch_size=2
    )
    trainer = make_trainer(tmp_path)
    logged = trainer.test(module, datamodule=data, verbose=False)[0]

    images = []
    for path in sorted(folder.iterdir()):
        pixels_CHW = torch.frombuffer(bytearray(decode_image(path.read_bytes()).tobytes()), dtype=torch.uint8)
        with Image.open(path) as image:
            images.append(pixels_CHW.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1)
    codes = encode_images(module.tokenizer, images, max_batch=2)
    psnr = {}
    for image_CHW, picture_CHW, item in zip(images, decode_images(module.tokenizer, codes), codes):
        assert picture_CHW.shape == image_CHW.shape
        height, width = item.size[0] + item.padding[0], item.size[1] + item.padding[1]
        level = shapes.schedule.nearest_level(height, width)
        error = ((picture_CHW.clamp(-1, 1) - image_CHW) / 2).square().mean()
        psnr.setdefault(level, []).append(float(-10 * error.log10()))
    assert set(psnr) == {32, 64}
    for level, values in psnr.items():
        assert logged[f"test/psnr/{level}"] == pytest.approx(sum(values) / len(values), rel=1e-4)

    trainer = make_trainer(tmp_path, [ReconstructionWriter(str(tmp_path / "out"))])
    trainer.predict(module, datamodule=data, return_predictions=False)
    written = [Image.open(path).size for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert sorted(written) == sorted((image_CHW.shape[2], image_CHW.shape[1]) for image_CHW in images)
