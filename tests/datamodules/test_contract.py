"""Every DataModule yields its batch contract, and refuses wrong data in words that say what to change."""

from types import SimpleNamespace

import pytest
import torch

from nextflow.datamodules.batches import ImageBatch, PackedBatch
from nextflow.datamodules.editing import EditingDataModule
from nextflow.datamodules.image_folder import ImageFolderDataModule
from nextflow.datamodules.image_to_text import ImageToTextDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.interleaved import InterleavedDataModule
from nextflow.datamodules.text import TextDataModule
from nextflow.datamodules.text_to_image import TextToImageDataModule
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import IGNORE, PADDING, UNKNOWN_CODE
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import ShardHeader, ShardWriter, decode_codes, open_shard


def packed(shapes, kind=TextToImageDataModule, shards="codes", **options):
    options = {"level": 32, "batch_size": 4, **options}
    return kind(
        shards=getattr(shapes, shards),
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=shapes.codebook_size,
        schedule=shapes.schedule,
        **options,
    )


def images(shapes, **options):
    return ImageDataModule(
        shards=shapes.documents, schedule=shapes.schedule, **{"levels": [32], "batch_size": 4, **options}
    )


def folder(shapes, **options):
    return ImageFolderDataModule(
        folders=shapes.folders, schedule=shapes.schedule, **{"levels": [32], "batch_size": 4, **options}
    )


KINDS = [TextDataModule, TextToImageDataModule, ImageToTextDataModule, EditingDataModule, InterleavedDataModule]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", ["codes", "documents"])
@pytest.mark.parametrize("packing", [{}, {"packing": "fixed_length", "max_length": 128, "batches_per_epoch": 3}])
def test_packed_batches_have_one_form(shapes, edits, kind, shards, packing):
    of_pairs = kind in (TextToImageDataModule, ImageToTextDataModule)
    data = packed(shapes if of_pairs else edits, kind, shards, **packing)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader())
    for batch in batches:
        assert isinstance(batch, PackedBatch)
        assert batch.level == 32 and batch.split == "train" and batch.num_documents == len(batch.keys)
        assert batch.state is not None
        rows = batch.rows
        if packing:
            assert rows.ids_BL.shape == (4, 128)
        assert sum(batch.lengths) == int((rows.document_BL != PADDING).sum())
        num_codes = sum(height * width for grids in batch.grids for height, width in grids)
        assert rows.code_N.shape == (num_codes,)
        if shards == "codes":
            assert not batch.images and bool((rows.code_N >= 0).all())
        else:
            assert bool((rows.code_N == UNKNOWN_CODE).all()) and len(batch.images) == len(batch.grids)
            for image, grids in zip(batch.images, batch.grids):
                assert image.dtype == torch.uint8
                assert image.shape == (3, grids[-1][0] * 8, grids[-1][1] * 8)
        of_document = {TextDataModule: 0, EditingDataModule: 2, InterleavedDataModule: 2}.get(kind, 1)
        assert len(batch.grids) == of_document * batch.num_documents
    moved = batches[0].to("cpu")
    assert torch.equal(moved.rows.ids_BL, batches[0].rows.ids_BL)


def test_the_codes_of_a_row_are_the_codes_of_the_shard(shapes):
    data = packed(shapes)
    stored = {}
    for path in sorted((shapes.root / "codes/32/train").glob("*.tar")):
        shard = open_shard(path)
        stored |= {key: decode_codes(shard.read(key, "0.npz")).codes_N for key in shard.keys}
    for batch in data.train_dataloader():
        expected = torch.cat([torch.from_numpy(stored[key]).long() for key in batch.keys])
        assert torch.equal(batch.rows.code_N, expected)
        predicted = batch.rows.target_BL.flatten()[batch.rows.code_position_N]
        assert torch.equal(predicted - data.vocabulary.code_offset, expected)


def test_evaluation_gives_each_document_once_and_whole(shapes):
    data = packed(shapes, caption_dropout=1.0, captioning_probability=1.0)
    batches = list(data.val_dataloader())
    assert sorted(key for batch in batches for key in batch.keys) == [f"validation{index:03d}" for index in range(7)]
    texts = [data.text_tokenizer.decode(row[(row > 1) & (row < data.vocabulary.boi)]) for row in batches[0].rows.ids_BL]
    assert texts[0] == "red shape number 0 of validation"


def test_caption_dropout_keeps_its_fraction_and_is_a_function_of_the_sample(shapes):
    def without_caption(**options):
        data = packed(shapes, caption_dropout=0.5, batches_per_epoch=50, **options)
        dropped = {}
        for number, batch in enumerate(data.train_dataloader()):
            for row, key in zip(batch.rows.ids_BL, batch.keys):
                dropped.setdefault(key, []).append((number, bool(row[1] == data.vocabulary.boi)))
        return {key: [flag for _, flag in flags] for key, flags in dropped.items()}

    first, second = without_caption(), without_caption(batch_size=2)
    flags = [flag for values in first.values() for flag in values]
    assert 0.35 < sum(flags) / len(flags) < 0.65
    # Another batch size changes nothing about what happens to a sample on its n-th pass.
    for key, values in second.items():
        assert values == first[key][: len(values)]


def test_captioning_turns_the_document_around_and_trains_the_text_alone(shapes):
    for data in (packed(shapes, captioning_probability=1.0), packed(shapes, ImageToTextDataModule)):
        batch = next(iter(data.train_dataloader()))
        assert bool((batch.rows.ids_BL[:, 1] == data.vocabulary.boi).all())
        targets = batch.rows.target_BL.flatten()[batch.rows.code_position_N]
        assert bool((targets == IGNORE).all())
        assert bool((batch.rows.target_BL == data.vocabulary.end_id).any(1).all())


def trained(batch, data):
    """For each image whether its codes are trained on, and how many text targets there are."""
    targets = batch.rows.target_BL
    of_codes = targets.flatten()[batch.rows.code_position_N].split(
        [sum(h * w for h, w in grids) for grids in batch.grids]
    )
    return [bool((part != IGNORE).all()) for part in of_codes], int(
        ((targets >= 0) & (targets < data.vocabulary.boi)).sum()
    )


def test_edits_learn_the_result_and_stories_everything(edits):
    data = packed(edits, EditingDataModule, instruction_dropout=0.0)
    assert trained(next(iter(data.train_dataloader())), data)[0] == [False, True] * 4
    data = packed(edits, EditingDataModule, source_loss=True, text_loss=False, instruction_dropout=0.0)
    images, num_texts = trained(next(iter(data.train_dataloader())), data)
    assert images == [True] * 8 and num_texts == 4  # the end of each document alone
    data = packed(edits, InterleavedDataModule)
    images, num_texts = trained(next(iter(data.train_dataloader())), data)
    assert images == [True] * 8 and num_texts > 8


def test_texts_longer_than_a_row_are_cut_not_skipped(shapes):
    data = packed(shapes, TextDataModule, max_length=6, packing="fixed_length", batches_per_epoch=4)
    for batch in data.train_dataloader():
        assert batch.lengths == (6,) * 4 and not batch.grids
    assert all(length <= 6 for batch in data.val_dataloader() for length in batch.lengths)


def test_a_caption_is_no_edit_and_says_so(shapes, caplog):
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction"):
        next(iter(packed(shapes, EditingDataModule).train_dataloader()))
    assert "is no edit: it holds text, image" in caplog.text


def test_a_document_without_anything_to_learn_is_skipped_and_says_so(shapes, tmp_path, caplog):
    segments = [{"text": "words", "loss": False}]
    with ShardWriter(tmp_path / "train", header=ShardHeader(kind="documents")) as writer:
        writer.write("given", {"segments": segments}, {})
        writer.write("learnt", {"segments": [*segments, {"text": "answer"}]}, {})
    data = packed(SimpleNamespace(**{**vars(shapes), "documents": {"train": str(tmp_path / "train/*.tar")}}), TextDataModule,
                  "documents", max_bad_fraction=0.6, batch_size=1)  # fmt: skip
    assert [batch.keys for batch in data.train_dataloader()] == [("learnt",)] * 2
    assert "key given: holds nothing that is trained on" in caplog.text


def test_text_loss_false_trains_codes_alone(shapes):
    data = packed(shapes, text_loss=False, caption_dropout=0.0)
    batch = next(iter(data.train_dataloader()))
    trained = batch.rows.target_BL[batch.rows.target_BL != IGNORE]
    assert not bool((trained < data.vocabulary.end_id).any())
    assert int(((trained < data.vocabulary.boi) & (trained != data.vocabulary.end_id)).sum()) == 0


def test_a_curriculum_sets_level_alpha_and_length_of_an_epoch(shapes):
    class Stage:
        level, alpha, num_batches, batch_size, budget, mixture = 64, 0.9, 3, 2, None, None

    data = packed(shapes)
    plain = next(iter(packed(shapes, level=64, batch_size=2).train_dataloader()))
    data.stages = [Stage()]
    batches = list(data.train_dataloader())
    assert [(batch.level, len(batch)) for batch in batches] == [(64, 2)] * 3
    assert batches[0].keys == plain.keys
    assert not torch.equal(batches[0].rows.weight_BL, plain.rows.weight_BL)


@pytest.mark.parametrize("make", [images, folder])
def test_image_batches_are_buckets(shapes, make):
    data = make(shapes, levels=[32, 64], batch_size=3)
    seen = set()
    for batch in data.train_dataloader():
        assert isinstance(batch, ImageBatch) and len(batch) == 3
        height, width = batch.grids[-1]
        assert batch.images.shape == (3, 3, height * 8, width * 8) and batch.images.dtype == torch.uint8
        assert batch.grids == shapes.schedule.grids(batch.level, batch.aspect_ratio)
        for caption, name, record in zip(batch.captions, batch.names, batch.records):
            assert {"image": name} in record["segments"]
            assert caption == ("" if make is folder else record["segments"][0]["text"])
        assert batch.valid_size is None
        seen.add((batch.level, batch.aspect_ratio))
    assert {level for level, _ in seen} == {32, 64} and {ratio for _, ratio in seen} == {0.25, 1.0}


@pytest.mark.parametrize("make", [images, folder])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_predict_gives_each_image_once_per_split_and_level(shapes, make, num_workers):
    data = make(shapes, levels=[32, 64], num_workers=num_workers)
    found = sorted((batch.split, batch.level, key) for batch in data.predict_dataloader() for key in batch.keys)
    assert found == sorted(
        (split, level, f"{split}{index:03d}")
        for split, count in shapes.num_samples.items()
        for level in (32, 64)
        for index in range(count)
    )


def test_every_image_of_a_document_is_predicted_and_one_is_trained_on(edits):
    data = images(edits, batch_size=8)
    found = sorted(
        (batch.split, key, name) for batch in data.predict_dataloader() for key, name in zip(batch.keys, batch.names)
    )
    assert found == sorted(
        (split, f"{split}{index:03d}", name)
        for split, count in edits.num_samples.items()
        for index in range(count)
        for name in ("0.png", "1.png")
    )
    seen = [(key, name) for batch in data.train_dataloader() for key, name in zip(batch.keys, batch.names)]
    assert len({key for key, _ in seen}) == len(seen) and {name for _, name in seen} == {"0.png", "1.png"}


@pytest.mark.parametrize("make", [images, folder])
def test_augmentation_changes_pixels_but_not_from_run_to_run(shapes, make):
    plain = next(iter(make(shapes).train_dataloader()))
    first = next(iter(make(shapes, horizontal_flip=True, min_crop_scale=0.5).train_dataloader()))
    second = next(iter(make(shapes, horizontal_flip=True, min_crop_scale=0.5).train_dataloader()))
    assert plain.keys == first.keys and torch.equal(first.images, second.images)
    assert not torch.equal(plain.images, first.images)


def test_an_image_of_the_buckets_size_keeps_its_pixels(shapes):
    batch = next(
        batch for batch in images(shapes, levels=[64], batch_size=1).val_dataloader() if batch.aspect_ratio == 1.0
    )
    corner = batch.images[0, :, 0, 0]
    assert corner.tolist() == [255, 255, 255]


def test_codes_of_another_tokenizer_are_refused_naming_both(shapes):
    class Tokenizer:
        def fingerprint(self):
            return "fedcba9876543210"

    class Trainer:
        class lightning_module:
            tokenizer = Tokenizer()

        global_rank, world_size, current_epoch = 0, 1, 0

    data = packed(shapes)
    data.trainer = Trainer()
    with pytest.raises(ValueError, match=r"0123456789abcdef.*fedcba9876543210"):
        data.train_dataloader()


def test_codes_of_another_schedule_are_refused_naming_both(shapes):
    other = ScaleSchedule(sides=(1, 2, 4, 8), levels={32: 3, 64: 4}, stride=8, base_grids=((8, 8),))
    data = TextToImageDataModule(
        shards=shapes.codes, text_tokenizer=shapes.text_tokenizer, codebook_size=64, schedule=other, level=32
    )
    with pytest.raises(ValueError, match=r"data\.schedule"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda shapes: packed(shapes, level=48), "level 48 does not exist; the schedule has 32, 64"),
        (lambda shapes: images(shapes, levels=[48]), "level 48 does not exist"),
        (lambda shapes: packed(shapes, caption_dropout=1.5), "data.caption_dropout"),
        (lambda shapes: packed(shapes, packing="fixed_length"), "data.max_length"),
        (lambda shapes: packed(shapes, batch_size=0), "data.batch_size"),
        (lambda shapes: images(shapes, min_crop_scale=0.0), "data.min_crop_scale"),
        (lambda shapes: folder(shapes, max_pixels=60), "data.max_pixels"),
        (lambda shapes: folder(shapes, test_splits=["nowhere"]).test_dataloader(), "data.folders has no split"),
        (lambda shapes: packed(shapes, test_splits=["nowhere"]).test_dataloader(), "no split 'nowhere'"),
    ],
)
def test_wrong_settings_name_their_key(shapes, make, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make(shapes)


def test_missing_data_names_the_key_and_the_command(tmp_path, shapes):
    data = ImageDataModule(shards={"train": f"{tmp_path}/*.tar"}, levels=[32], schedule=shapes.schedule)
    with pytest.raises(FileNotFoundError, match=r"data\.shards\.train.*nextflow\.datamodules\.openmoji"):
        data.train_dataloader()
    data = TextToImageDataModule(
        shards={"train": f"{tmp_path}/{{level}}/*.tar"},
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=64,
        schedule=shapes.schedule,
        level=32,
    )
    with pytest.raises(FileNotFoundError, match=r"data\.shards\.train.*CodeWriter"):
        data.train_dataloader()


def test_a_broken_sample_is_skipped_and_named(broken_shard, shapes, caplog):
    options = {
        "shards": {"train": f"{broken_shard}/*.tar"},
        "levels": [32],
        "schedule": shapes.schedule,
        "batch_size": 1,
    }
    data = ImageDataModule(**options, max_bad_fraction=0.1)
    keys = {key for batch in data.train_dataloader() for key in batch.keys}
    assert keys == {f"s{index:02d}" for index in range(20)} - {"s02"}
    assert "000000.tar, key s02" in caplog.text
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction"):
        list(ImageDataModule(**options, max_bad_fraction=0.0).train_dataloader())


def test_codes_beyond_the_codebook_are_refused(shapes):
    data = TextToImageDataModule(
        shards=shapes.codes, text_tokenizer=shapes.text_tokenizer, codebook_size=2, schedule=shapes.schedule, level=32
    )
    with pytest.raises(ValueError, match="cannot be read"):
        next(iter(data.train_dataloader()))


def test_overlong_documents_are_skipped(shapes):
    data = packed(shapes, max_length=10, max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="none of the samples"):
        next(iter(data.train_dataloader()))


def test_alpha_reweights_scales(shapes):
    flat = next(iter(packed(shapes).train_dataloader())).rows
    reweighted = next(iter(packed(shapes, layout=LayoutConfig(alpha=0.9)).train_dataloader())).rows
    assert torch.equal(flat.target_BL, reweighted.target_BL)
    assert not torch.equal(flat.weight_BL, reweighted.weight_BL)
