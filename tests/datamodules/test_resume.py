"""Interrupted == straight: after resume a module sees exactly the batches it would have seen."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nextflow.callbacks.restart_data import RestartData
from nextflow.datamodules.arrangements import CaptionThenImage, ImageThenCaption, SourceThenResult
from nextflow.datamodules.editing import EditingDataModule
from nextflow.datamodules.image_folder import ImageFolderDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.mixture import MixtureDataModule, Source
from nextflow.datamodules.text_to_image import TextToImageDataModule

pytestmark = pytest.mark.usefixtures("edits")


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
    alpha, budget = 0.5, None

    def __init__(self, level, num_batches, batch_size, mixture=None):
        self.level, self.num_batches, self.batch_size, self.mixture = level, num_batches, batch_size, mixture


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


def make_editing(shapes, shards="documents", **options):
    return EditingDataModule(
        shards=getattr(shapes.edits, shards),
        schedule=shapes.schedule,
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=shapes.codebook_size,
        level=32,
        batch_size=3,
        instruction_dropout=0.4,
        validation_splits=[],
        batches_per_epoch=5,
        **options,
    )


def make_mixture(shapes, **options):
    """Two levels and changing weights: `captions` rests in the second stage, `edits` comes in with it."""
    data = MixtureDataModule(
        sources={
            "drawings": Source(shards=shapes.codes, weight=2, arrange=CaptionThenImage(caption_dropout=0.4)),
            "captions": Source(shards=shapes.codes, weight=1, arrange=ImageThenCaption()),
            "edits": Source(shards=shapes.edits.codes, weight=1, arrange=SourceThenResult(instruction_dropout=0.4)),
        },
        schedule=shapes.schedule,
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=shapes.codebook_size,
        level=32,
        packing="fixed_length",
        max_length=400,
        batch_size=2,
        validation_splits=[],
        **options,
    )
    data.stages = [
        Stage(32, 4, 3, {"drawings": 2, "captions": 1}),
        Stage(64, 3, 1, {"drawings": 1, "edits": 3}),
        Stage(32, 6, 2),
    ]
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
        (make_editing, 0),
        (make_mixture, 0),
        (make_mixture, 2),
        (make_mixture, 3),
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


def test_resume_with_another_world_size_may_begin_the_data_anew(shapes):
    saved = make_packed(shapes).state_dict()
    saved["ranks"] = [{"elsewhere": {}}, {}]
    data = make_packed(shapes, seed=5)
    RestartData().setup(SimpleNamespace(datamodule=data), None, "fit")
    data.load_state_dict(saved)
    assert data.state_dict()["ranks"] == [{}]
    with pytest.raises(ValueError, match=r"RestartData needs a DataModule of nextflow\.datamodules"):
        RestartData().setup(SimpleNamespace(datamodule=None), None, "fit")


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


def batches_of_ranks(make, shapes, num_ranks, num_workers, num_batches, states=None):
    """What each rank of a run sees, and the state that its checkpoint holds; driven as Lightning drives it."""
    ranks, seen = [], []
    for rank in range(num_ranks):
        data = make(shapes, num_workers=num_workers)
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=num_ranks, current_epoch=0, global_step=0, log_every_n_steps=50, loggers=[],
            lightning_module=None, state=SimpleNamespace(fn="fit"),
        )  # fmt: skip
        epochs = [5] * 20 if data.stages is None else [stage.num_batches for stage in data.stages]
        done = 0
        if states is not None:
            done = states["done"]
            data.load_state_dict(states["state"])
        mine = []
        for epoch, length in enumerate(epochs):
            if done >= length:  # this epoch lies behind the checkpoint
                done -= length
                continue
            data.trainer.current_epoch = epoch
            for number, batch in enumerate(data.train_dataloader(), start=done):
                if len(mine) == num_batches or number >= length:
                    break
                batch = data.on_after_batch_transfer(batch, 0)
                mine.append((epoch, number, tuple(batch.keys), fingerprint(batch)))
            done = 0
            if len(mine) == num_batches:
                break
        seen.append(mine)
        ranks.append(data.state_dict())
    state = {**ranks[0], "ranks": [one["ranks"][0] for one in ranks]}
    return seen, state


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("make", [make_packed, make_editing, make_mixture])
def test_two_ranks_go_on_where_each_of_them_stood(shapes, make, num_workers):
    """Interrupted inside the second stage, or epoch; the ranks see different documents all the time."""
    straight, _ = batches_of_ranks(make, shapes, 2, num_workers, 11)
    assert [len(part) for part in straight] == [11, 11] and straight[0] != straight[1]
    first, state = batches_of_ranks(make, shapes, 2, num_workers, 6)
    resumed, _ = batches_of_ranks(make, shapes, 2, num_workers, 5, {"state": state, "done": 6})
    for rank in (0, 1):
        assert first[rank] + resumed[rank] == straight[rank]


def test_a_mixture_keeps_what_a_resting_source_holds_back(shapes):
    """A document that was read but not packed when its source came to rest is packed when the source comes back."""
    data = make_mixture(shapes)
    seen, state = batches_of_ranks(make_mixture, shapes, 1, 0, 7)
    assert {key for _, _, keys, _ in seen[0][4:] for key in keys}
    (position,) = state["ranks"][0]["mixture"]["slots"].values()
    waiting = {place[3].split(" ")[0] for place in position["pending"]}
    assert waiting <= set(data.sources) and any(
        place[3].startswith(("drawings", "captions")) for place in position["pending"]
    )
    places = {name.split(" ")[0] for name in position["next"]["streams"]}
    assert places == {"drawings", "captions", "edits"}
