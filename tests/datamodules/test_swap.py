"""One run, every data type: `--data` alone decides what a real, tiny PretrainingModule is trained on."""

import re
from pathlib import Path

import lightning as L
import pytest
import yaml

from nextflow.datamodules.images import ImageDataModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.main import cli
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.sequence.shards import open_shard

MODULES = {
    "text": "nextflow.datamodules.text.TextDataModule",
    "text_to_image": "nextflow.datamodules.text_to_image.TextToImageDataModule",
    "image_to_text": "nextflow.datamodules.image_to_text.ImageToTextDataModule",
    "editing": "nextflow.datamodules.editing.EditingDataModule",
    "interleaved": "nextflow.datamodules.interleaved.InterleavedDataModule",
}
ARRANGEMENTS = ("TextOnly", "CaptionThenImage", "ImageThenCaption", "SourceThenResult", "AsStored")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    """Lightning warns where arguments are passed while pytest's own stand in sys.argv."""
    monkeypatch.setattr("sys.argv", ["main.py"])


@pytest.fixture(scope="module")
def run(edits, tmp_path_factory):
    """A folder with run.yaml, which trains on edits as captions, and mixture.yaml, which mixes all data types."""
    folder = tmp_path_factory.mktemp("swap")
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    config = TokenizerConfig(
        schedule=edits.schedule, codebook_size=edits.codebook_size, pixel_dim=4, semantic=None, pixel=pixel
    )
    trainer = L.Trainer(accelerator="cpu", max_steps=1, default_root_dir=folder, **QUIET)
    images = ImageDataModule(
        shards=edits.documents, levels=[32], schedule=edits.schedule, batch_size=4, validation_splits=[]
    )
    trainer.fit(TokenizerModule(config, stage="pixel"), images)
    trainer.save_checkpoint(folder / "tokenizer.ckpt")
    schedule = edits.schedule.to_dict()
    data = {
        "text_tokenizer": edits.text_tokenizer,
        "codebook_size": 64,
        "level": 32,
        "schedule": schedule,
        "batch_size": 4,
    }
    transformer = {"width": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48,
                   "rope_sections": [2, 1, 1], "max_scales": 7}  # fmt: skip
    model = {
        "transformer": transformer,
        "tokenizer": str(folder / "tokenizer.ckpt"),
        "text_tokenizer": edits.text_tokenizer,
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    }
    trainer_options = {**QUIET, "accelerator": "cpu", "max_steps": 2, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
                       "val_check_interval": 2}  # fmt: skip
    whole = {
        "trainer": {**trainer_options, "limit_val_batches": 1, "default_root_dir": str(folder)},
        "model": {"class_path": "nextflow.lightning_modules.pretraining.PretrainingModule", "init_args": model},
        "data": {"class_path": MODULES["text_to_image"], "init_args": {**data, "shards": edits.documents}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(whole))
    sources = {name: {"shards": edits.documents, "arrange": name} for name in ARRANGEMENTS}
    mixture = {
        "class_path": "nextflow.datamodules.mixture.MixtureDataModule",
        "init_args": {**data, "sources": sources, "batches_per_epoch": 4, "packing": "fixed_length", "max_length": 192},
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    return folder


@pytest.fixture(scope="module")
def codes(run, edits):
    """Patterns of token shards: what `predict` makes of the documents, two images each."""
    predict = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": str(run),
                    "callbacks": [{"class_path": "nextflow.callbacks.code_writer.CodeWriter",
                                   "init_args": {"output": str(run / "codes")}}]},
        "model": {"class_path": "nextflow.lightning_modules.tokenizer.TokenizerModule",
                  "init_args": {"stage": "pixel", "tokenizer": {
                      "schedule": edits.schedule.to_dict(), "codebook_size": 64, "pixel_dim": 4, "semantic": None,
                      "pixel": {"width": 8, "multipliers": [1, 1, 1, 1], "num_blocks": 1, "latent_width": 8, "groups": 4,
                                "attention": False}}}},
        "data": {"class_path": "nextflow.datamodules.images.ImageDataModule",
                 "init_args": {"shards": edits.documents, "levels": [32], "schedule": edits.schedule.to_dict()}},
        "ckpt_path": str(run / "tokenizer.ckpt"),
    }  # fmt: skip
    (run / "predict.yaml").write_text(yaml.safe_dump(predict))
    # A fixture of the module runs before the one that clears the command line.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["main.py"])
        cli(["predict", "-c", str(run / "predict.yaml")])
    shard = open_shard(run / "codes/32/train/000000.tar")
    assert len(shard) == 22 and all(sorted(shard.files(key)) == ["0.npz", "1.npz", "json"] for key in shard.keys)
    return {split: f"{run}/codes/{{level}}/{split}/*.tar" for split in ("train", "validation")}


def fit(run, data, *options):
    """Names of the losses that the run logs."""
    logged = cli(["fit", "-c", str(run / "run.yaml"), "--data", data, *options]).trainer.callback_metrics
    assert logged["train/loss"].isfinite() and logged["val/loss"].isfinite()
    return {name for name in logged if name.startswith("train/loss_") and "scale" not in name}


def reading(patterns):
    """The option that makes a DataModule read other shards."""
    return f"--data.init_args.shards={yaml.safe_dump(patterns, default_flow_style=True).strip()}"


@pytest.mark.parametrize("name", ["pictures_alone.PicturesAlone", "squares.Squares"])
def test_data_modules_of_the_documentation_train(run, tmp_path, monkeypatch, name):
    """The examples of docs/data.md, word for word, in place of one of ours."""
    module = name.split(".")[0]
    documentation = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    (code,) = re.findall(rf"```python\n(# lab/{module}\.py\n.*?)```", documentation, re.DOTALL)
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert "train/loss_image" in fit(run, name)


@pytest.mark.parametrize("name", MODULES)
def test_data_alone_is_swapped(run, codes, name):
    learnt = {"train/loss_text", *(() if name in ("text", "image_to_text") else ("train/loss_image",))}
    assert fit(run, MODULES[name]) == learnt
    assert fit(run, MODULES[name], reading(codes)) == learnt


def test_all_of_them_are_mixed(run, codes):
    assert fit(run, str(run / "mixture.yaml")) == {"train/loss_text", "train/loss_image"}
    mixture = yaml.safe_load((run / "mixture.yaml").read_text())
    for source in mixture["init_args"]["sources"].values():
        source["shards"] = codes
    (run / "mixture_of_codes.yaml").write_text(yaml.safe_dump(mixture))
    assert fit(run, str(run / "mixture_of_codes.yaml")) == {"train/loss_text", "train/loss_image"}


def test_codes_made_on_the_fly_are_those_of_token_shards(run, codes):
    """A fresh model of one seed, over the whole validation split."""
    command = ["validate", "-c", str(run / "run.yaml"), "--data", MODULES["editing"], "--trainer.limit_val_batches=1.0"]
    losses = [
        {name: float(value) for name, value in cli([*command, *options]).trainer.callback_metrics.items()}
        for options in ((), (reading(codes),))
    ]
    assert losses[0]["val/loss"] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-5)
