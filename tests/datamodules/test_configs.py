"""Every DataModule is built from YAML by jsonargparse, nested dataclasses and all, and documents its arguments."""

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from nextflow.datamodules.arrangements import AsStored, CaptionThenImage, SourceThenResult
from nextflow.datamodules.editing import EditingDataModule
from nextflow.datamodules.image_to_text import ImageToTextDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.interleaved import InterleavedDataModule
from nextflow.datamodules.mixture import MixtureDataModule
from nextflow.datamodules.prompts import PromptDataModule, PromptItem
from nextflow.datamodules.text import TextDataModule
from nextflow.datamodules.text_to_image import TextToImageDataModule

SCHEDULE = {"sides": [1, 2, 3, 4, 5, 6, 8], "levels": {32: 4, 64: 7}, "stride": 8, "base_grids": [[8, 8]]}
PATHS = {
    "images": "nextflow.datamodules.images.ImageDataModule",
    "text_to_image": "nextflow.datamodules.text_to_image.TextToImageDataModule",
    "image_to_text": "nextflow.datamodules.image_to_text.ImageToTextDataModule",
    "text": "nextflow.datamodules.text.TextDataModule",
    "editing": "nextflow.datamodules.editing.EditingDataModule",
    "interleaved": "nextflow.datamodules.interleaved.InterleavedDataModule",
    "mixture": "nextflow.datamodules.mixture.MixtureDataModule",
    "prompts": "nextflow.datamodules.prompts.PromptDataModule",
}


@pytest.fixture
def parser():
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # as main.py does
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    return parser


def build(parser, name, **options):
    config = {"data": {"class_path": PATHS[name], "init_args": {"schedule": SCHEDULE, **options}}}
    return parser.instantiate(parser.parse_string(yaml.safe_dump(config))).data


def test_images(parser):
    data = build(parser, "images", shards={"train": "x/*.tar"}, levels=[32, 64], horizontal_flip=True)
    assert isinstance(data, ImageDataModule) and data.levels == [32, 64]
    assert data.schedule.levels == {32: 4, 64: 7} and data.schedule.base_grids == ((8, 8),)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("text", TextDataModule),
        ("text_to_image", TextToImageDataModule),
        ("image_to_text", ImageToTextDataModule),
        ("editing", EditingDataModule),
        ("interleaved", InterleavedDataModule),
    ],
)
def test_packed(parser, shapes, name, kind):
    data = build(
        parser,
        name,
        shards={"train": "x/{level}/*.tar"},
        text_tokenizer=shapes.text_tokenizer,
        codebook_size=64,
        level=32,
        layout={"alpha": 0.9, "interpolation": "nearest"},
        packing="fixed_length",
        max_length=256,
    )
    assert isinstance(data, kind) and data.layout.alpha == 0.9 and data.vocabulary.codebook_size == 64


def test_mixture_sources_name_their_arrangement_shortly(parser, shapes):
    sources = {
        "drawings": {"shards": {"train": "x/{level}/*.tar"}, "weight": 3, "arrange": "CaptionThenImage"},
        "edits": {
            "shards": {"train": "y/*.tar"},
            "arrange": {"class_path": "SourceThenResult", "init_args": {"text_loss": False}},
        },
        "stories": {"shards": {"train": "z/*.tar"}},
    }
    options = {"text_tokenizer": shapes.text_tokenizer, "codebook_size": 64, "level": 32, "batches_per_epoch": 5}
    data = build(parser, "mixture", sources=sources, **options)
    assert isinstance(data, MixtureDataModule) and data.weights(None) == {"drawings": 3, "edits": 1, "stories": 1}
    assert data.arrangements == {
        "drawings": CaptionThenImage(),
        "edits": SourceThenResult(text_loss=False),
        "stories": AsStored(),
    }
    with pytest.raises(ArgumentError, match="wieght"):
        build(parser, "mixture", sources={"a": {"shards": {}, "wieght": 2}}, **options)


def test_prompts(parser, shapes):
    items = ["a", {"prompt": "b", "level": 64, "seed": 3}]
    data = build(parser, "prompts", prompts=items, text_tokenizer=shapes.text_tokenizer, level=32)
    assert isinstance(data, PromptDataModule) and data.prompts == ["a", PromptItem(prompt="b", level=64, seed=3)]


def test_a_misspelt_key_is_named(parser):
    with pytest.raises(ArgumentError, match="batchsize"):
        build(parser, "images", shards={}, levels=[32], batchsize=3)


@pytest.mark.parametrize(
    "kind",
    [ImageDataModule, TextDataModule, TextToImageDataModule, ImageToTextDataModule, EditingDataModule, InterleavedDataModule,
     MixtureDataModule, PromptDataModule],
)  # fmt: skip
def test_every_argument_is_documented(kind):
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser()
    parser.add_class_arguments(kind)
    for action in parser._actions:
        if action.dest not in ("help", "config") and "." not in action.dest:
            assert action.help and action.help != "==SUPPRESS==", action.dest
