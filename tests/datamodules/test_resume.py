"""Interrupted == straight: after resume a module sees exactly the batches it would have seen."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nextflow.datamodules.image_folder import ImageFolderDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.text_to_image import TextToImageDataModule


class Recorder(L.LightningModule):
    """Trains one number and notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_index):
        assert batch.state is None
        self.seen.append((self.trainer.current_epoch, batch_index, tuple(batch.keys), fingerprint(batch)))
        return self.weight.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fingerprint(batch):
    tensor = batch.images.float() if hasattr(batch, "captions") else batch.rows.target_BL.float()
    weights = torch.arange(tensor.numel(), dtype=torch.float64) % 1013
    return float((tensor.flatten().double() * weights).sum())


class Stage:
    alpha = 0.5

    def __init__(self, level, num_batches, batch_size):
        self.level, self.num_batches, self.batch_size = level, num_batches, batch_size


def make_images(shapes, **options):
    return ImageDataModule(
        shards=shapes.documents,
        schedule=shapes.schedule,
        levels=[32, 64],
        batch_size=3,
        horizontal_flip=True,
        min_crop_scale=0.7,
        validation_splits=[],
        batches_per_epoch=5,
        **options,
    )


def make_folder(shapes, **options):
    return ImageFolderDataModule(
        folders=shapes.folders,
        schedule=shapes.schedule,
        batch_size=3,
        horizontal_flip=True,
        min_crop_scale=0.7,
        validation_splits=[],
        batches_per_epoch=5,
        **options,
    )


def make_packed(shapes, shards="codes", **options):
    return TextToImageDataModule(
        shards=getattr(shapes, shards),
        schedule=shapes.schedule,
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=shapes.codebook_size,
        level=32,
        batch_size=3,
        caption_dropout=0.4,
        captioning_probability=0.2,
        validation_splits=[],
        batches_per_epoch=5,
        **options,
    )


def make_fixed_length(shapes, **options):
    return make_packed(shapes, packing="fixed_length", max_length=128, **options)


def make_curriculum(shapes, **options):
    data = make_packed(shapes, **options)
    data.stages = [Stage(32, 4, 3), Stage(64, 3, 2), Stage(32, 6, 2)]
    return data


def make_document_curriculum(shapes, **options):
    data = make_packed(shapes, shards="documents", packing="fixed_length", max_length=256, **options)
    data.stages = [Stage(32, 4, 3), Stage(64, 3, 2), Stage(32, 6, 1)]
    return data


def train(data, folder, max_steps, save_at=None, checkpoint=None):
    module = Recorder()
    callbacks = []
    if save_at is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=save_at, save_top_k=-1))
    trainer = L.Trainer(
        max_steps=max_steps,
        max_epochs=-1 if data.stages is None else len(data.stages),
        reload_dataloaders_every_n_epochs=1 if data.stages else 0,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=save_at is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module.seen


# Epochs are 5 batches long, or 4, 3 and 6 with a curriculum: interrupted inside an epoch, at its end, and inside a later one.
@pytest.mark.parametrize("interruption", [3, 4, 5, 6])
@pytest.mark.parametrize(
    ("make", "num_workers"),
    [
        (make_images, 0),
        (make_images, 2),
        (make_folder, 0),
        (make_folder, 2),
        (make_packed, 0),
        (make_fixed_length, 0),
        (make_fixed_length, 2),
        (make_curriculum, 0),
        (make_curriculum, 2),
        (make_document_curriculum, 0),
    ],
)
def test_an_interrupted_run_sees_the_same_batches(shapes, tmp_path, make, num_workers, interruption):
    straight = train(make(shapes, num_workers=num_workers), tmp_path, 12, save_at=interruption)
    checkpoint = tmp_path / f"step={interruption}.ckpt"
    resumed = train(make(shapes, num_workers=num_workers), tmp_path, 12, checkpoint=checkpoint)
    assert len(straight) == 12
    assert resumed == straight[interruption:]


def test_epochs_go_on_where_the_last_one_stopped(shapes, tmp_path):
    seen = train(make_images(shapes), tmp_path, 15)
    keys = [key for _, _, batch, _ in seen for key in batch]
    # 45 images of 22: nearly every image twice, none far more often than that (buckets hold some back).
    counts = {key: keys.count(key) for key in set(keys)}
    assert len(counts) >= 21 and max(counts.values()) <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_workers": 2}, r"data\.num_workers = 1, this run has 2"), ({"seed": 5}, r"data\.seed")],
)
def test_resume_with_other_settings_is_refused(shapes, change, message):
    saved = make_packed(shapes).state_dict()
    with pytest.raises(ValueError, match=message):
        make_packed(shapes, **change).load_state_dict(saved)


def test_resume_with_another_world_size_is_refused(shapes):
    saved = make_packed(shapes).state_dict()
    saved["ranks"] = [{}, {}]
    with pytest.raises(ValueError, match=r"trainer\.devices.* = 2, this run has 1"):
        make_packed(shapes).load_state_dict(saved)


def test_evaluation_begins_at_the_beginning_with_any_settings(shapes, tmp_path):
    class Evaluated(Recorder):
        def predict_step(self, batch, batch_index):
            self.seen += batch.keys

    train(make_images(shapes), tmp_path, 4, save_at=3)
    module = Evaluated()
    data = make_images(shapes, num_workers=1, seed=5, predict_splits=["validation"])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.predict(module, data, ckpt_path=tmp_path / "step=3.ckpt", return_predictions=False, weights_only=False)
    assert sorted(set(module.seen)) == [f"validation{index:03d}" for index in range(7)]
