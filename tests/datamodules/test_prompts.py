import pytest
import torch

from nextflow.datamodules.batches import RawImage
from nextflow.datamodules.prompts import PromptDataModule, PromptItem
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.shards import open_shard


def make(shapes, **options):
    return PromptDataModule(text_tokenizer=shapes.text_tokenizer, schedule=shapes.schedule, level=32, **options)


def prompts_of(data):
    return [prompt for batch in data.predict_dataloader() for prompt in batch.prompts]


def test_strings_and_items(shapes):
    items = ["a red shape", PromptItem(prompt="a wide one", level=64, aspect_ratio=0.3, seed=99)]
    data = make(shapes, prompts=items, seed=5, batch_size=1)
    first, second = prompts_of(data)
    assert (first.index, first.level, first.aspect_ratio, first.seed, first.task) == (0, 32, 1.0, 5, "image")
    assert (second.index, second.level, second.aspect_ratio, second.seed) == (1, 64, 0.25, 99)
    (segment,) = first.segments
    assert isinstance(segment, TextSegment) and data.text_tokenizer.decode(segment.ids) == "a red shape"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_text_file_has_one_prompt_a_line(shapes, tmp_path, num_workers):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    data = make(shapes, prompt_file=str(tmp_path / "prompts.txt"), batch_size=1, num_workers=num_workers)
    assert [(prompt.index, prompt.text) for prompt in prompts_of(data)] == [(0, "one"), (1, "two"), (2, "three")]


def test_captions_of_shards(shapes):
    prompts = prompts_of(make(shapes, shards=shapes.documents, per_split=4))
    assert [prompt.split for prompt in prompts] == ["train"] * 4 + ["validation"] * 4
    assert [prompt.index for prompt in prompts] == list(range(8))
    assert all(f"shape number {prompt.metadata['number']} of {prompt.split}" in prompt.text for prompt in prompts)
    same = prompts_of(make(shapes, shards=shapes.codes, per_split=4))
    assert [prompt.key for prompt in same] == [prompt.key for prompt in prompts]


def test_task_text_shows_the_image_and_hides_the_caption(shapes):
    prompts = prompts_of(make(shapes, shards=shapes.documents, splits=["validation"], task="text"))
    assert len(prompts) == 7
    for prompt in prompts:
        (segment,) = prompt.segments
        assert isinstance(segment, RawImage) and segment.pixels_CHW.dtype == torch.uint8
        height, width = segment.grids[-1]
        assert segment.pixels_CHW.shape == (3, 8 * height, 8 * width)
        assert "of validation" in prompt.text and prompt.task == "text"
    assert {prompt.aspect_ratio for prompt in prompts} == {0.25, 1.0}


def test_an_image_of_the_config_stands_in_front(shapes, tmp_path):
    shard = open_shard(shapes.root / "train/000000.tar")
    (tmp_path / "x.png").write_bytes(shard.read(shard.keys[1], "0.png"))
    (prompt,) = prompts_of(
        make(shapes, prompts=[PromptItem(prompt="what is it?", image=str(tmp_path / "x.png"))], task="text")
    )
    assert [type(segment) for segment in prompt.segments] == [RawImage, TextSegment]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of data.prompts"),
        ({"prompts": ["a"], "prompt_file": "b"}, "exactly one of data.prompts"),
        ({"prompts": ["a"], "aspect_ratio": 9.0}, "data.aspect_ratio: aspect_ratio 9"),
        ({"prompts": ["a", PromptItem(prompt="b", level=48)]}, r"data.prompts\[1\].level: level 48"),
        ({"prompts": [PromptItem(prompt="b", aspect_ratio=0.1)]}, r"data.prompts\[0\].aspect_ratio: aspect_ratio 0.1"),
    ],
)
def test_wrong_settings_name_their_key(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        make(shapes, **options)


def test_wrong_data_names_its_place(shapes, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"data\.prompts\[0\].*x\.png cannot be used"):
        prompts_of(make(shapes, prompts=[PromptItem(image=str(tmp_path / "x.png"))], task="text"))
    with pytest.raises(ValueError, match=r"task text needs"):
        prompts_of(make(shapes, prompts=["a"], task="text"))
    with pytest.raises(ValueError, match=r"holds codes, task text needs document shards"):
        prompts_of(make(shapes, shards=shapes.codes, task="text"))
    with pytest.raises(FileNotFoundError, match=r"data\.prompt_file"):
        prompts_of(make(shapes, prompt_file=str(tmp_path / "none.txt")))
