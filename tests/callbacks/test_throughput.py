"""Throughput: counts are those of the documents, times those of a clock that the test turns."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from nextflow.callbacks import throughput
from nextflow.callbacks.fsdp_sharding import FSDPSharding
from nextflow.callbacks.throughput import Throughput
from nextflow.datamodules import loader as loaders
from nextflow.datamodules.batches import PackedBatch
from nextflow.datamodules.loader import WaitedLoader
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.flops import DecoderShape, FlopsModel, Work, document_work
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out

CONFIG = TransformerConfig(
    text_size=30, codebook_size=25, code_dim=6, start_id=0, end_id=1, width=16, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_width=24, rope_sections=(2, 1, 1), max_scales=3,
)  # fmt: skip
GRIDS = ((1, 1), (2, 2))


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass where the test says so alone."""
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(throughput, "time", fake)
    monkeypatch.setattr(loaders, "time", fake)
    return clock


def document(length, codes=True):
    image = ImageSegment(grids=GRIDS, codes=torch.zeros(5, dtype=torch.long) if codes else None)
    return Document(segments=(TextSegment(ids=[2] * length), image))


DOCUMENTS = [[[document(3)], [document(9)]], [[document(5), document(2)]], [[document(4)]], [[document(1)]]]


def batch(rows, codes=True):
    if not codes:
        rows = [[document(len(one.segments[0].ids), codes=False) for one in row] for row in rows]
    return PackedBatch(
        rows=lay_out(rows, CONFIG.vocabulary, LayoutConfig(alpha=0.9)), num_documents=sum(map(len, rows)), level=32
    )


class Data(torch.utils.data.Dataset):
    """Takes a second to make each batch."""

    def __init__(self, clock, batches):
        self.clock, self.batches = clock, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        self.clock.now += 1
        return self.batches[index]


class Module(L.LightningModule):
    """Takes three seconds for a step, and a thousand for validation."""

    def __init__(self, clock):
        super().__init__()
        self.config, self.clock = CONFIG, clock
        self.transformer = Transformer(CONFIG)

    def training_step(self, batch, batch_idx):
        self.clock.now += 3
        return self.transformer.norm.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.clock.now += 1000

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(clock, module=None, batches=None, peak=None, callbacks=(), loader=WaitedLoader, **options):
    options = {"log_every_n_steps": 2, "max_epochs": 1, "precision": "32-true", **options}
    trainer = L.Trainer(
        **options, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=1, callbacks=[Throughput(peak), *callbacks],
    )  # fmt: skip
    data = Data(clock, [batch(rows) for rows in DOCUMENTS] if batches is None else batches)
    trainer.fit(module or Module(clock), loader(data, batch_size=None), loader(data, batch_size=None))
    return {
        name.removeprefix("throughput/"): value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith("throughput/")
    }


def work_of(batches):
    return sum((document_work(one) for rows in batches for row in rows for one in row), Work())


def flops(work, **options):
    model = FlopsModel(shape=DecoderShape.of(CONFIG), vocabulary_size=CONFIG.vocabulary.size, code_dim=CONFIG.code_dim)
    return model.of_the_model(work, **options)


def test_values_are_those_of_the_documents_since_the_last_log(clock):
    """Four batches in two steps logged together; validation after the first pair does not count."""
    logged = run(clock, peak=1e-6, val_check_interval=2)
    work = work_of(DOCUMENTS[2:])
    assert logged == pytest.approx(
        {
            "tokens_per_second": work.positions / 8,
            "teraflops_per_device": flops(work) / 8e12,
            "mfu": flops(work) / 8e12 / 1e-6,
            "padding": 0.0,
            "data_wait": 0.25,
        }
    )


def test_padding_and_accumulated_batches(clock):
    logged = run(clock, log_every_n_steps=1, accumulate_grad_batches=2, limit_train_batches=2)
    work = work_of(DOCUMENTS[:2])
    short, long = (document_work(row[0]).positions for row in DOCUMENTS[0])
    assert logged["padding"] == pytest.approx((long - short) / (work.positions + long - short))
    assert logged["tokens_per_second"] == pytest.approx(work.positions / 8)
    assert logged["teraflops_per_device"] == pytest.approx(flops(work) / 8e12)


def test_images_that_are_encoded_on_the_fly_count_as_codes_do(clock):
    stored = run(clock, batches=[batch(rows) for rows in DOCUMENTS])
    assert run(clock, batches=[batch(rows, codes=False) for rows in DOCUMENTS]) == stored


def test_every_epoch_has_its_own_loader(clock):
    """Waiting is added up over the loaders of a curriculum's stages."""

    class Stages(L.LightningDataModule):
        def train_dataloader(self):
            return WaitedLoader(Data(clock, [batch(DOCUMENTS[2])] * 3), batch_size=None)

    trainer = L.Trainer(
        max_epochs=4, reload_dataloaders_every_n_epochs=1, accelerator="cpu", logger=False, log_every_n_steps=6,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Throughput()],
    )  # fmt: skip
    trainer.fit(Module(clock), datamodule=Stages())
    assert trainer.callback_metrics["throughput/data_wait"].item() == pytest.approx(0.25)


def test_frozen_blocks_take_less(clock):
    module = Module(clock)
    module.transformer.blocks.requires_grad_(False)
    work = work_of(DOCUMENTS[2:])
    assert run(clock, module)["teraflops_per_device"] == pytest.approx(flops(work, blocks_train=False) / 8e12)


def test_what_is_not_known_is_not_logged(clock):
    """A CPU's peak, and the waiting of loaders that are not ours."""
    assert set(run(clock, loader=torch.utils.data.DataLoader)) == {
        "tokens_per_second",
        "teraflops_per_device",
        "padding",
    }


@pytest.mark.parametrize(
    ("precision", "param_dtype", "expected"),
    [
        ("32-true", None, torch.float32),
        ("bf16-mixed", None, torch.bfloat16),
        ("16-true", None, torch.float16),
        ("32-true", "bfloat16", torch.bfloat16),
    ],
)
def test_the_type_of_products(precision, param_dtype, expected):
    callbacks = [Throughput(), FSDPSharding(wrap=[], param_dtype=param_dtype)]
    trainer = SimpleNamespace(callbacks=callbacks, precision=precision)
    assert throughput._compute_dtype(trainer) is expected


def test_wrong_use_is_explained(clock):
    with pytest.raises(ValueError, match="Throughput counts the rows of PackedBatches; this run's batches are list"):
        run(clock, batches=[[torch.zeros(1)]])
    with pytest.raises(ValueError, match=r"Throughput\.peak_teraflops must be positive"):
        Throughput(0)
