"""A mixture: kinds share rows, weights follow the stages, shares are logged, and mistakes name their key."""

import csv
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from nextflow.callbacks.resolution_curriculum import ResolutionCurriculum, Stage
from nextflow.datamodules.arrangements import CaptionThenImage, ImageThenCaption, SourceThenResult, TextOnly
from nextflow.datamodules.mixture import MixtureDataModule, Source
from nextflow.sequence.layout import IGNORE


def make(shapes, edits, shards="codes", weights=None, **options):
    weights = {"drawings": 2, "captions": 1, "edits": 1, "text": 0, **(weights or {})}
    of = {"drawings": (shapes, CaptionThenImage()), "captions": (shapes, ImageThenCaption()),
          "edits": (edits, SourceThenResult()), "text": (edits, TextOnly())}  # fmt: skip
    sources = {
        name: Source(shards=getattr(data, shards), weight=weights[name], arrange=arrange)
        for name, (data, arrange) in of.items()
    }
    return MixtureDataModule(
        sources=sources,
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=shapes.codebook_size,
        schedule=shapes.schedule,
        **{"level": 32, "batch_size": 4, "batches_per_epoch": 6, **options},
    )


@pytest.mark.parametrize("shards", ["codes", "documents"])
def test_documents_of_different_kinds_share_rows(shapes, edits, shards):
    data = make(shapes, edits, shards, {"text": 1}, packing="fixed_length", max_length=192)
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    kinds_of_rows = set()
    for batch in batches:
        assert batch.rows.ids_BL.shape == (4, 192)
        assert len(batch.sources) == len(batch.lengths) == batch.num_documents
        names = iter(batch.sources)
        for row in batch.rows.document_BL:
            kinds_of_rows.add(tuple(sorted({next(names) for _ in range(int(row.max()) + 1)})))
        images = {"drawings": 1, "captions": 1, "edits": 2, "text": 0}
        assert len(batch.grids) == sum(images[name] for name in batch.sources)
        assert len(batch.images) == (0 if shards == "codes" else len(batch.grids))
    assert any(len(names) > 1 for names in kinds_of_rows)
    assert {name for names in kinds_of_rows for name in names} == {"drawings", "captions", "edits", "text"}


def test_each_source_is_arranged_in_its_own_way(shapes, edits):
    data = make(shapes, edits, weights={"drawings": 0, "captions": 1, "edits": 1}, batches_per_epoch=10)
    for batch in data.train_dataloader():
        targets = batch.rows.target_BL.flatten()[batch.rows.code_position_N]
        of_image = iter(targets.split([sum(h * w for h, w in grids) for grids in batch.grids]))
        for name in batch.sources:
            learnt = [bool((next(of_image) != IGNORE).all()) for _ in range(2 if name == "edits" else 1)]
            assert learnt == ([False, True] if name == "edits" else [False])


def test_weights_are_shares_of_documents(shapes, edits):
    data = make(shapes, edits, weights={"drawings": 3, "captions": 0, "edits": 1}, batches_per_epoch=150)
    drawn = [name for batch in data.train_dataloader() for name in batch.sources]
    assert set(drawn) == {"drawings", "edits"} and abs(drawn.count("edits") / len(drawn) - 0.25) < 0.06


def test_a_stage_sets_weights_and_evaluation_sees_every_source(shapes, edits):
    data = make(shapes, edits)
    stage = Stage(level=64, num_batches=3, batch_size=2, alpha=0.9, mixture={"edits": 5.0})
    data.stages = [stage]
    batches = list(data.train_dataloader())
    assert [(batch.level, set(batch.sources), len(batch)) for batch in batches] == [(64, {"edits"}, 2)] * 3
    seen = [(name, key) for batch in data.val_dataloader() for name, key in zip(batch.sources, batch.keys)]
    assert len(seen) == len(set(seen)) == 4 * 7


def test_codes_beside_images_are_refused(shapes, edits):
    data = make(shapes, edits)
    data.sources["edits"] = Source(shards=edits.documents, arrange=SourceThenResult())
    with pytest.raises(ValueError, match="some documents hold images and others codes"):
        list(data.train_dataloader())


def test_a_broken_source_is_named_even_if_it_is_rare(shapes, edits):
    data = make(shapes, edits, batches_per_epoch=2000, max_bad_fraction=0.05)
    data.arrangements["edits"] = SourceThenResult()
    data.sources["edits"] = Source(
        shards=shapes.codes, weight=0.02, arrange=SourceThenResult()
    )  # captions are no edits
    with pytest.raises(ValueError, match=r"samples of edits cannot be read, more than `data\.max_bad_fraction`"):
        list(data.train_dataloader())


class Learner(L.LightningModule):
    """Trains one number."""

    total_steps = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.levels = []

    def training_step(self, batch, batch_index):
        assert batch.state is None
        self.levels.append((batch.level, tuple(sorted(set(batch.sources)))))
        return self.weight.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_shares_are_logged_and_the_curriculum_changes_them(shapes, edits, tmp_path):
    stages = [
        Stage(level=32, num_batches=8, mixture={"drawings": 1.0, "text": 1.0}),
        Stage(level=64, num_batches=5, mixture={"edits": 1.0}),
    ]
    logger = CSVLogger(tmp_path)
    trainer = L.Trainer(
        max_epochs=2, reload_dataloaders_every_n_epochs=1, accelerator="cpu", logger=logger, log_every_n_steps=4,
        callbacks=[ResolutionCurriculum(stages)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    module = Learner()
    trainer.fit(module, make(shapes, edits))
    assert {level for level, _ in module.levels[:8]} == {32} and module.levels[8:] == [(64, ("edits",))] * 5
    with open(f"{logger.log_dir}/metrics.csv") as file:
        shares = [row for row in csv.DictReader(file) if row["mixture/documents/edits"]]
    assert [(int(row["step"]), float(row["mixture/documents/edits"])) for row in shares] == [(4, 0), (8, 0), (12, 1)]
    for row in shares:
        for what in ("documents", "positions"):
            values = [float(row[f"mixture/{what}/{name}"]) for name in ("drawings", "captions", "edits", "text")]
            assert abs(sum(values) - 1) < 1e-6
    # Texts are shorter than documents with an image: fewer positions than documents.
    assert float(shares[0]["mixture/positions/text"]) < float(shares[0]["mixture/documents/text"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, e: make(s, e, weights={"edits": -1}), r"data\.sources\.edits\.weight must not be negative"),
        (lambda s, e: make(s, e, batches_per_epoch=None).train_dataloader(), r"data\.batches_per_epoch"),
        (
            lambda s, e: make(s, e, weights={"drawings": 0, "captions": 0, "edits": 0}).train_dataloader(),
            "no source has a weight",
        ),
        (lambda s, e: make(s, e, validation_splits=["nowhere"]).val_dataloader(), "no split 'nowhere'"),
    ],
)
def test_wrong_settings_name_their_key(shapes, edits, call, message):
    with pytest.raises(ValueError, match=message):
        call(shapes, edits)


def test_missing_shards_name_their_source(shapes, edits):
    data = make(shapes, edits)
    data.sources["edits"] = Source(shards={"train": "nowhere/{level}/*.tar"})
    with pytest.raises(FileNotFoundError, match=r"data\.sources\.edits\.shards\.train.*nowhere/32.*CodeWriter"):
        data.train_dataloader()
    data.sources["edits"] = Source(shards={"validation": "nowhere/*.tar"})
    with pytest.raises(ValueError, match=r"data\.sources\.edits\.shards has no split 'train'"):
        data.train_dataloader()


def test_a_curriculum_that_names_another_source_is_refused_at_once(shapes, edits):
    curriculum = ResolutionCurriculum([Stage(level=32, num_batches=1, mixture={"edit": 1.0})])
    trainer = SimpleNamespace(
        reload_dataloaders_every_n_epochs=1,
        max_epochs=1,
        max_steps=-1,
        accumulate_grad_batches=1,
        datamodule=make(shapes, edits),
    )
    with pytest.raises(ValueError, match="mixture names 'edit', but the sources of the data are"):
        curriculum.setup(trainer, SimpleNamespace(), "fit")
