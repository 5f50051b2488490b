"""Packing by budget through a DataModule: rows of one work, on every rank, resumed exactly, refused in words that help."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nextflow.datamodules.arrangements import ImageThenCaption
from nextflow.datamodules.mixture import MixtureDataModule, Source
from nextflow.datamodules.packs import Filling
from nextflow.datamodules.text_to_image import TextToImageDataModule
from nextflow.sequence.flops import DecoderShape, FlopsModel, Work
from nextflow.sequence.layout import PADDING
from nextflow.sequence.packing import TOLERANCE

SHAPE = DecoderShape(width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128)
BUDGET = 600


def make(shapes, **options):
    options = {
        "level": 32,
        "batch_size": 1,
        "budget": BUDGET,
        "batches_per_epoch": 5,
        "validation_splits": [],
        **options,
    }
    return TextToImageDataModule(
        shards=getattr(shapes, options.pop("shards", "codes")),
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=shapes.codebook_size,
        schedule=shapes.schedule,
        packing="fixed_budget",
        transformer=SHAPE,
        caption_dropout=0.4,
        **options,
    )


def work_of(batch, data):
    """Work of a batch, from its tensors: what the rows see, predict and embed."""
    rows = batch.rows
    visible = rows.visible_BLL() & (rows.document_BL != PADDING)[:, :, None]
    work = Work(
        positions=int((rows.document_BL != PADDING).sum()),
        pairs=int(visible.sum()),
        cells=rows.input_position_M.numel(),
        targets=int(rows.num_targets),
    )
    return FlopsModel(shape=SHAPE, vocabulary_size=data.vocabulary.size).in_positions(work)


@pytest.mark.parametrize("shards", ["codes", "documents"])
def test_a_batch_is_one_row_of_the_budgets_work(shapes, shards):
    data = make(shapes, shards=shards, batches_per_epoch=12)
    batches = list(data.train_dataloader())
    assert len(batches) == 12
    for batch in batches:
        assert batch.rows.ids_BL.shape[0] == 1 and batch.num_documents > 1
        assert not bool((batch.rows.document_BL == PADDING).any())
        if shards == "codes":  # targets of images are only known with their codes
            assert 0.85 * BUDGET < work_of(batch, data) <= (1 + TOLERANCE) * BUDGET
            assert batch.rows.ids_BL.shape[1] <= (1 + TOLERANCE) * BUDGET


def test_ranks_get_as_many_batches_of_the_same_work(shapes):
    class Trainer:
        lightning_module = None
        world_size, current_epoch = 2, 0

        def __init__(self, rank):
            self.global_rank = rank

    seen = []
    for rank in range(2):
        data = make(shapes, batches_per_epoch=10)
        data.trainer = Trainer(rank)
        seen.append([(work_of(batch, data), batch.keys) for batch in data.train_dataloader()])
    assert [len(batches) for batches in seen] == [10, 10]
    assert [keys for _, keys in seen[0]] != [keys for _, keys in seen[1]]
    for (first, _), (second, _) in zip(*seen):
        assert abs(first - second) < 0.15 * BUDGET


def test_evaluation_gives_each_document_once(shapes):
    data = make(shapes, validation_splits=["validation"])
    keys = [key for batch in data.val_dataloader() for key in batch.keys]
    assert sorted(keys) == [f"validation{index:03d}" for index in range(7)]


def test_documents_of_a_mixture_share_rows(shapes):
    data = MixtureDataModule(
        sources={
            "drawings": Source(shards=shapes.codes),
            "captions": Source(shards=shapes.codes, weight=2.0, arrange=ImageThenCaption()),
        },
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=shapes.codebook_size,
        schedule=shapes.schedule,
        level=32,
        packing="fixed_budget",
        transformer=SHAPE,
        budget=BUDGET,
        batch_size=1,
        batches_per_epoch=10,
    )
    batches = list(data.train_dataloader())
    assert {source for batch in batches for source in batch.sources} == {"drawings", "captions"}
    assert sum(len(set(batch.sources)) == 2 for batch in batches) > 5
    assert all(0.85 * BUDGET < work_of(batch, data) <= (1 + TOLERANCE) * BUDGET for batch in batches)


class Recorder(L.LightningModule):
    """Trains one number and notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_index):
        weights = torch.arange(batch.rows.target_BL.numel(), dtype=torch.float64) % 1013
        self.seen.append((batch.level, tuple(batch.keys), float((batch.rows.target_BL.flatten() * weights).sum())))
        return self.weight.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stage:
    alpha, batch_size, mixture = 0.5, None, None

    def __init__(self, level, num_batches, budget):
        self.level, self.num_batches, self.budget = level, num_batches, budget


def train(data, folder, save_at=None, checkpoint=None):
    module = Recorder()
    callbacks = (
        [] if save_at is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=save_at, save_top_k=-1)]
    )
    trainer = L.Trainer(
        max_steps=12,
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


# Epochs of 5 batches, or of 4, 3 and 6 with a curriculum whose stages differ in level and budget.
@pytest.mark.parametrize("interruption", [3, 4, 6])
@pytest.mark.parametrize(
    ("num_workers", "curriculum", "shards"), [(0, False, "codes"), (2, True, "codes"), (0, True, "documents")]
)
def test_an_interrupted_run_sees_the_same_batches(shapes, tmp_path, num_workers, curriculum, shards, interruption):
    def data():
        made = make(shapes, num_workers=num_workers, shards=shards)
        made.stages = [Stage(32, 4, None), Stage(64, 3, 900), Stage(32, 6, 300)] if curriculum else None
        return made

    straight = train(data(), tmp_path, save_at=interruption)
    resumed = train(data(), tmp_path, checkpoint=tmp_path / f"step={interruption}.ckpt")
    assert len(straight) == 12
    assert resumed == straight[interruption:]


def test_documents_above_the_budget_are_skipped_and_named(shapes, caplog):
    with pytest.raises(ValueError, match=r"cannot be read|can be used"):
        next(iter(make(shapes, budget=50).train_dataloader()))
    assert "more than data.budget = 50" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": None}, "data.packing = fixed_budget needs data.budget"),
        ({"batch_size": 4}, "set data.batch_size, and batch_size of a curriculum's stage, to 1 (it is 4)"),
        ({"batches_per_epoch": None}, "data.packing = fixed_budget needs data.batches_per_epoch"),
    ],
)
def test_wrong_settings_name_their_key(shapes, options, message):
    with pytest.raises(ValueError) as error:
        make(shapes, **options).train_dataloader()
    assert message in str(error.value)


def test_the_sizes_of_the_transformer_are_needed(shapes):
    with pytest.raises(ValueError, match=r"needs data\.transformer, the sizes of model\.transformer"):
        TextToImageDataModule(
            shards=shapes.codes,
            text_tokenizer=shapes.text_tokenizer,
            codebook_size=shapes.codebook_size,
            schedule=shapes.schedule,
            level=32,
            batch_size=1,
            packing="fixed_budget",
            budget=BUDGET,
        )
    with pytest.raises(ValueError, match=r"data\.max_length"):
        Filling(packing="fixed_length", batch_size=1)
