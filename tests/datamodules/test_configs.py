"""Every DataModule is built from YAML by jsonargparse, nested dataclasses and all, and documents its arguments."""

import lightning as L
import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from nextflow.datamodules.image_to_text import ImageToTextDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.prompts import PromptDataModule, PromptItem
from nextflow.datamodules.text_to_image import TextToImageDataModule

SCHEDULE = {"sides": [1, 2, 3, 4, 5, 6, 8], "levels": {32: 4, 64: 7}, "stride": 8, "base_grids": [[8, 8]]}
PATHS = {
    "images": "nextflow.datamodules.images.ImageDataModule",
    "text_to_image": "nextflow.datamodules.text_to_image.TextToImageDataModule",
    "image_to_text": "nextflow.datamodules.image_to_text.ImageToTextDataModule",
    "prompts": "nextflow.datamodules.prompts.PromptDataModule",
}


@pytest.fixture
def parser():
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
    ("name", "kind"), [("text_to_image", TextToImageDataModule), ("image_to_text", ImageToTextDataModule)]
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


def test_prompts(parser, shapes):
    items = ["a", {"prompt": "b", "level": 64, "seed": 3}]
    data = build(parser, "prompts", prompts=items, text_tokenizer=shapes.text_tokenizer, level=32)
    assert isinstance(data, PromptDataModule) and data.prompts == ["a", PromptItem(prompt="b", level=64, seed=3)]


def test_a_misspelt_key_is_named(parser):
    with pytest.raises(ArgumentError, match="batchsize"):
        build(parser, "images", shards={}, levels=[32], batchsize=3)


@pytest.mark.parametrize("kind", [ImageDataModule, TextToImageDataModule, ImageToTextDataModule, PromptDataModule])
def test_every_argument_is_documented(kind):
    parser = ArgumentParser()
    parser.add_class_arguments(kind)
    for action in parser._actions:
        if action.dest not in ("help", "config") and "." not in action.dest:
            assert action.help and action.help != "==SUPPRESS==", action.dest
