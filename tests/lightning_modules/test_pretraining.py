"""PretrainingModule: trains, keeps the tokenizer frozen, normalises by all targets, checkpoints explain themselves."""

from dataclasses import dataclass, replace

import lightning as L
import pytest
import torch

from nextflow.datamodules.batches import Prompt, PromptBatch, RawImage
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.lightning_modules.transformer_checkpoint import load_transformer
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.config import DecoderConfig
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.flops import DecoderShape
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import PackedRows, lay_out
from nextflow.sequence.scales import Grid, ScaleSchedule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8, base_grids=((2, 8), (4, 4), (8, 2)))
DECODER = DecoderConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, rope_sections=(2, 1, 1), max_scales=4
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The part of PackedBatch that the module reads."""

    rows: PackedRows
    images: tuple = ()
    grids: tuple[tuple[Grid, ...], ...] = ()
    level: int = 32

    def to(self, device, non_blocking=False):
        return replace(self, rows=self.rows.to(device), images=tuple(image.to(device) for image in self.images))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny tokenizer checkpoint and a tiny text tokenizer."""
    folder = tmp_path_factory.mktemp("pretraining")
    train_text_tokenizer(["a red dog", "two blue cats"], folder / "text", size=300)
    for name in ("tokenizer", "other"):
        pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
        config = TokenizerConfig(schedule=SCHEDULE, codebook_size=17, pixel_dim=4, semantic=None, pixel=pixel)
        module = TokenizerModule(config, stage="pixel")
        trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False, max_steps=1)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


def make(folder, **changes):
    torch.manual_seed(0)
    options = {
        "transformer": DECODER,
        "tokenizer": str(folder / "tokenizer.ckpt"),
        "text_tokenizer": str(folder / "text"),
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
    }
    return PretrainingModule(**{**options, **changes})


def trainer(folder, **changes):
    options = {
        "max_steps": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "default_root_dir": folder, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return L.Trainer(**{**options, **changes})


def batches(module, raw=True, alpha=0.0):
    """Three batches of different numbers of targets: images of two sizes and text, as pixels or as codes."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for count in (1, 3, 2):
        documents, images, grids = [], [], []
        for index in range(count):
            of_image = SCHEDULE.grids(32, (1.0, 0.25)[index % 2])
            grids.append(of_image)
            height, width = of_image[-1]
            images.append(torch.randint(0, 256, (3, 8 * height, 8 * width), generator=generator, dtype=torch.uint8))
            codes = None if raw else module.encode([images[-1]], [of_image])[0]
            text = TextSegment(ids=torch.randint(2, 250, (2 + index,), generator=generator).tolist())
            documents.append([Document(segments=(text, ImageSegment(grids=of_image, codes=codes), text))])
        rows = lay_out(documents, module.config.vocabulary, LayoutConfig(alpha=alpha))
        made.append(Batch(rows=rows, images=tuple(images), grids=tuple(grids)) if raw else Batch(rows=rows))
    return made


def loader(items):
    return torch.utils.data.DataLoader(items, batch_size=None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_validate_and_frozen_tokenizer(folder, precision):
    module = make(folder)
    frozen = {key: value.clone() for key, value in module.tokenizer.state_dict().items()}
    run = trainer(folder, precision=precision)
    run.fit(module, loader(batches(module)), loader(batches(module)))
    module.train()
    assert not module.tokenizer.training and not any(p.requires_grad for p in module.tokenizer.parameters())
    assert all(torch.equal(frozen[key], value) for key, value in module.tokenizer.state_dict().items())
    assert not any("tokenizer" in name for name, _ in module.named_parameters())
    logged = run.callback_metrics
    for name in ("train/loss", "train/loss_text", "train/loss_image", "train/loss_image/scale_03", "train/accuracy/text",
                 "train/accuracy/scale_01", "train/gradient_norm", "val/loss"):  # fmt: skip
        assert name in logged and logged[name].isfinite(), name
    run.test(module, loader(batches(module)), verbose=False)
    assert "test/loss_image/scale_02" in run.callback_metrics


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_pixels_and_codes_give_the_same_loss(folder, precision):
    losses = []
    for raw in (True, False):
        module = make(folder)
        run = trainer(folder, precision=precision)
        run.fit(module, loader(batches(module, raw)))
        losses.append(run.callback_metrics["train/loss"])
    assert torch.equal(*losses)


def test_accumulation_equals_one_large_batch(folder):
    """Three batches of 1, 3 and 2 documents accumulated == one batch of 6: gradients are divided by all targets."""
    weights = []
    for accumulate in (3, 1):
        module = make(folder)
        items = batches(module, raw=False, alpha=0.9)
        if accumulate == 1:
            separate = batches(module, raw=True, alpha=0.9)
            codes = torch.cat([item.rows.code_N for item in items])
            rows = merge(separate, module).with_codes(codes, module.config.vocabulary.code_offset)
            items = [Batch(rows=rows)]
        trainer(folder, max_steps=1, accumulate_grad_batches=accumulate).fit(module, loader(items))
        weights.append(module.transformer.state_dict())
    start = make(folder)
    start.configure_model()
    moved = (weights[0]["blocks.0.mlp.down_proj.weight"] - start.transformer.blocks[0].mlp.down_proj.weight).abs().max()
    assert moved > 1e-4
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-5, atol=1e-6, msg=key)


def merge(items, module):
    """The rows of several batches as one."""
    documents = []
    generator = torch.Generator().manual_seed(5)
    for item in items:
        for index in range(item.rows.ids_BL.shape[0]):
            of_image = item.grids[index]
            height, width = of_image[-1]
            torch.randint(0, 256, (3, 8 * height, 8 * width), generator=generator, dtype=torch.uint8)
            text = TextSegment(ids=torch.randint(2, 250, (2 + index,), generator=generator).tolist())
            documents.append([Document(segments=(text, ImageSegment(grids=of_image), text))])
    return lay_out(documents, module.config.vocabulary, LayoutConfig(alpha=0.9))


def test_validation_is_over_the_whole_set(folder):
    module = make(folder)
    run = trainer(folder)
    (values,) = run.validate(module, loader(batches(module)), verbose=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches(module):
            rows = module._with_codes(batch)
            tokens = module.transformer.cross_entropy(module.transformer(rows), rows.target_BL)
            total, count = total + float(tokens.loss_N.sum()), count + int(rows.num_targets)
    assert values["val/loss"] == pytest.approx(total / count, rel=1e-5)


def test_alignment_trains_the_new_parts_alone(folder):
    module = make(folder, trainable="alignment")
    module.configure_model()
    before = {key: value.clone() for key, value in module.transformer.state_dict().items()}
    trainer(folder).fit(module, loader(batches(module)))
    moved = {key for key, value in module.transformer.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {
        "boundary_embedding.weight", "code_embedding.weight", "connector.0.weight", "connector.0.bias", "connector.2.weight",
        "connector.2.bias", "scale_embedding.weight", "head.weight",
    }  # fmt: skip


def test_checkpoint_explains_itself_and_refuses_other_tokenizers(folder, tmp_path):
    module = make(folder)
    run = trainer(folder)
    run.fit(module, loader(batches(module)))
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    loaded = load_transformer(path)
    assert loaded.levels == tuple(module.trained_levels) == (32,)
    assert loaded.schedule == SCHEDULE and loaded.tokenizer_fingerprint == module.tokenizer.fingerprint()
    assert loaded.text_tokenizer.decode(loaded.text_tokenizer.encode("a red dog")) == "a red dog"
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.transformer.state_dict().values(), module.transformer.state_dict().values())
    )
    again = PretrainingModule.load_from_checkpoint(path)
    assert torch.equal(again.transformer.head.weight, module.transformer.head.weight)
    assert again.trained_levels == {32}

    stage_two = make(folder, initialize_from=str(path))
    trainer(folder, max_steps=0).fit(stage_two, loader(batches(stage_two)))
    assert torch.equal(stage_two.transformer.head.weight, module.transformer.head.weight)
    assert stage_two.trained_levels == {32}

    other = make(folder, tokenizer=str(folder / "other.ckpt"))
    with pytest.raises(ValueError, match=module.tokenizer.fingerprint()) as error:
        trainer(folder, max_steps=4).fit(other, loader(batches(other)), ckpt_path=path)
    assert other.tokenizer.fingerprint() in str(error.value)
    with pytest.raises(ValueError, match=r"features='residual'.*model\.layout is .*features='accumulated'"):
        other = make(folder, layout=LayoutConfig(features="accumulated"))
        trainer(folder, max_steps=4).fit(other, loader(batches(other)), ckpt_path=path)
    with pytest.raises(ValueError, match="num_layers 2, not 3"):
        other = make(folder, transformer=replace(DECODER, num_layers=3))
        trainer(folder, max_steps=4).fit(other, loader(batches(other)), ckpt_path=path)
    with pytest.raises(ValueError, match=r"not one of a PretrainingModule.*model\.tokenizer"):
        trainer(folder, max_steps=4).fit(make(folder), loader(batches(module)), ckpt_path=folder / "other.ckpt")
    with pytest.raises(ValueError, match="initialize_from"):
        other = make(folder, tokenizer=str(folder / "other.ckpt"), initialize_from=str(path))
        trainer(folder).fit(other, loader(batches(other)))


def test_data_of_another_vocabulary_or_layout_is_refused(folder):
    """A shifted `<boi>` or another range of positions would train without a word."""
    module = make(folder)

    class Data(L.LightningDataModule):
        codebook_size = module.config.codebook_size
        layout = LayoutConfig(alpha=0.9)  # alpha is the data's own

        def train_dataloader(self):
            return loader(batches(module))

    trainer(folder, max_steps=1).fit(module, datamodule=Data())
    Data.layout = LayoutConfig(rope_range=8.0)
    with pytest.raises(ValueError, match=r"data\.layout and the model's differ"):
        trainer(folder, max_steps=1).fit(make(folder), datamodule=Data())
    Data.layout, Data.codebook_size = LayoutConfig(), 7
    with pytest.raises(ValueError, match=r"data\.codebook_size and the model's differ: 7 and"):
        trainer(folder, max_steps=1).fit(make(folder), datamodule=Data())
    # Packing by budget has to count the work of this transformer, and not of another.
    Data.codebook_size, Data.transformer = module.config.codebook_size, replace(DecoderShape.of(DECODER), num_layers=3)
    with pytest.raises(ValueError, match=r"data\.transformer and the model's differ: DecoderShape\(.*num_layers=3"):
        trainer(folder, max_steps=1).fit(make(folder), datamodule=Data())


def test_code_embedding_starts_as_the_codebook(folder):
    module = make(folder)
    module.configure_model()
    vectors = module.tokenizer.quantizer.lookup(torch.arange(17))
    assert torch.equal(module.transformer.code_embedding.weight, vectors)


def test_resume_equals_a_straight_run(folder, tmp_path):
    straight = make(folder)
    trainer(folder).fit(straight, loader(batches(straight)))
    # The schedule must span the whole run, so the interrupted one is told its length.
    first = make(folder, total_steps=3)
    run = trainer(folder, max_steps=2)
    run.fit(first, loader(batches(first)))
    run.save_checkpoint(tmp_path / "half.ckpt")
    half = make(folder, total_steps=3)
    trainer(folder).fit(half, loader(batches(half)[2:]), ckpt_path=tmp_path / "half.ckpt")
    assert half.trainer.global_step == 3
    for a, b in zip(half.transformer.state_dict().values(), straight.transformer.state_dict().values()):
        assert torch.equal(a, b)


def test_a_run_outlives_the_file_it_began_with(folder, tmp_path):
    """A resumed run takes nothing from it; one that begins, or is validated as it begins, needs it."""
    start = make(folder)
    run = trainer(folder, max_steps=1)
    run.fit(start, loader(batches(start)))
    run.save_checkpoint(tmp_path / "start.ckpt")
    options = {"total_steps": 3, "initialize_from": str(tmp_path / "start.ckpt")}
    first, straight = make(folder, **options), make(folder, **options)
    run = trainer(folder, max_steps=2)
    run.fit(first, loader(batches(first)))
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(folder).fit(straight, loader(batches(straight)))
    (tmp_path / "start.ckpt").unlink()
    half = make(folder, **options)
    trainer(folder).fit(half, loader(batches(half)[2:]), loader(batches(half)), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(half.transformer.state_dict().values(), straight.transformer.state_dict().values()):
        assert torch.equal(a, b)
    trainer(folder).validate(half, loader(batches(half)), verbose=False)
    for begin in ("fit", "validate"):
        with pytest.raises(FileNotFoundError, match=r"initialize_from: .*start\.ckpt does not exist"):
            getattr(trainer(folder), begin)(make(folder, **options), loader(batches(half)))


def test_open_length_is_refused(folder):
    module = make(folder)
    with pytest.raises(ValueError, match=r"model\.total_steps or trainer\.max_steps"):
        trainer(folder, max_steps=-1, max_epochs=-1).fit(module, loader(batches(module)))


def test_predict_answers_prompts_in_order(folder):
    """An image behind a text, an image behind an image and a text, a text behind an image: pixels of prompts are encoded."""
    module = make(folder, guidance=1.0, max_text_tokens=3)
    grids = SCHEDULE.grids(16)
    picture = RawImage(pixels_CHW=torch.zeros(3, 16, 16, dtype=torch.uint8), grids=grids, aspect_ratio=1.0)
    text = TextSegment(ids=module.text_tokenizer.encode("a red dog"))
    prompts = tuple(
        Prompt(index=index, segments=segments, text="a red dog", level=32, aspect_ratio=ratio, seed=index, task=task)
        for index, (segments, ratio, task) in enumerate(
            [((text,), 1.0, "image"), ((picture, text), 0.25, "image"), ((picture,), 1.0, "text")]
        )
    )
    (results,) = trainer(folder).predict(module, loader([PromptBatch(prompts=prompts)]))
    assert [result.index for result in results] == [0, 1, 2]
    assert [None if result.image is None else tuple(result.image.shape) for result in results] == [
        (32, 32, 3),
        (16, 64, 3),
        None,
    ]
    assert results[0].text is None and isinstance(results[2].text, str)
