from io import BytesIO
from itertools import islice

import pytest
import torch
from PIL import Image

from nextflow.datamodules.batches import RawImage
from nextflow.datamodules.prompts import PromptDataModule, PromptItem
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import ShardHeader, ShardWriter, open_shard


def make(shapes, shards=None, **options):
    return PromptDataModule(
        text_tokenizer=shapes.text_tokenizer, schedule=shapes.schedule, level=32, shards=shards, **options
    )


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
    prompts = prompts_of(make(shapes, shapes.documents, per_split=4))
    assert [prompt.split for prompt in prompts] == ["train"] * 4 + ["validation"] * 4
    assert [prompt.index for prompt in prompts] == list(range(8))
    assert all(f"shape number {prompt.metadata['number']} of {prompt.split}" in prompt.text for prompt in prompts)
    same = prompts_of(make(shapes, shapes.codes, per_split=4))
    assert [prompt.key for prompt in same] == [prompt.key for prompt in prompts]


def test_task_text_shows_the_image_and_hides_the_caption(shapes):
    prompts = prompts_of(make(shapes, shapes.documents, splits=["validation"], task="text"))
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
    with pytest.raises(ValueError, match=r"holds codes; prompts with images need document shards"):
        prompts_of(make(shapes, shapes.codes, task="text"))
    with pytest.raises(FileNotFoundError, match=r"data\.prompt_file"):
        prompts_of(make(shapes, prompt_file=str(tmp_path / "none.txt")))


def stream(data, batches):
    return list(islice(data.train_dataloader(), batches))


def names(batches):
    return [(prompt.key, prompt.seed, prompt.index) for batch in batches for prompt in batch.prompts]


def test_fit_gets_every_prompt_once_a_pass_with_seeds_of_its_own(shapes):
    data = make(shapes, shapes.documents, seed=40, batch_size=4)
    seen = names(stream(data, 11))
    keys = [key for key, _, _ in seen]
    assert sorted(keys[:22]) == sorted(keys[22:44]) == [f"train{index:03d}" for index in range(22)]
    assert keys[:22] != keys[22:44]
    assert [seed for _, seed, _ in seen] == [40 + index for _, _, index in seen] == list(range(40, 84))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_goes_on_where_it_was_consumed(shapes, num_workers):
    straight = stream(make(shapes, shapes.documents, batch_size=3), 9)
    data = make(shapes, shapes.documents, batch_size=3, num_workers=num_workers)
    first = [data.on_after_batch_transfer(batch, 0) for batch in stream(data, 4)]
    assert names(first) == names(straight[:4]) and all(batch.position is None for batch in first)
    resumed = make(shapes, shapes.documents, batch_size=3, num_workers=num_workers)
    resumed.load_state_dict(data.state_dict())
    assert names(stream(resumed, 5)) == names(straight[4:])
    with pytest.raises(ValueError, match=r"data\.batch_size = 3, this run has 2"):
        make(shapes, shapes.documents, batch_size=2).load_state_dict(data.state_dict())


def test_edits_show_sources_and_instruction_and_know_their_result(shapes, edits):
    for prompt in prompts_of(make(shapes, edits.documents, splits=["validation"])):
        source, instruction = prompt.segments
        assert isinstance(source, RawImage) and isinstance(instruction, TextSegment)
        assert prompt.text.startswith("now make it") and prompt.task == "image"
        assert prompt.reference.dtype == torch.uint8 and not torch.equal(prompt.reference, source.pixels_CHW)
        assert prompt.aspect_ratio == prompt.reference.shape[1] / prompt.reference.shape[2]
    with pytest.raises(ValueError, match="prompts with images need document shards"):
        prompts_of(make(shapes, edits.codes))


def test_reasoning_is_asked_for_by_segments_without_loss(shapes, tmp_path):
    record = {"segments": [{"text": "two plus one dots", "loss": False}, {"text": "three dots"}, {"image": "0.png"}]}
    picture = open_shard(shapes.root / "train/000000.tar")
    with ShardWriter(tmp_path / "train", header=ShardHeader(kind="documents")) as writer:
        writer.write("a", record, {"0.png": picture.read(picture.keys[1], "0.png")})
    shards = {"train": f"{tmp_path}/train/*.tar"}
    (prompt,) = prompts_of(make(shapes, shards, task="reasoning"))
    assert prompt.text == "two plus one dots" and len(prompt.segments) == 1 and prompt.reference is not None
    with pytest.raises(ValueError, match="segments without loss"):
        prompts_of(make(shapes, shapes.documents, task="reasoning"))


def test_prompts_that_are_too_long_are_refused_or_left_out(shapes, tmp_path, caplog):
    long = "a very long prompt " * 20
    with pytest.raises(ValueError, match=r"data\.prompts\[1\] has \d+ text ids, data\.max_prompt_length is 16"):
        make(shapes, prompts=["a short one", long], max_prompt_length=16).predict_dataloader()
    lengths = [len(segment.ids) for prompt in prompts_of(make(shapes, shapes.documents)) for segment in prompt.segments]
    limit = sorted(lengths)[len(lengths) // 2]
    kept = prompts_of(make(shapes, shapes.documents, max_prompt_length=limit))
    assert len(kept) == sum(length <= limit for length in lengths) < len(lengths)
    assert f"{len(lengths) - len(kept)} of {len(lengths)} prompts are longer" in caplog.text
    batch = next(iter(make(shapes, shapes.documents, max_prompt_length=limit, batch_size=64).train_dataloader()))
    assert max(len(segment.ids) for prompt in batch.prompts for segment in prompt.segments) <= limit
    with pytest.raises(ValueError, match=r"have more text ids than data\.max_prompt_length = 1"):
        make(shapes, shapes.documents, max_prompt_length=1).predict_dataloader()


def test_a_question_is_asked_by_segments_without_loss_and_known_by_the_others(shapes, tmp_path):
    given = [{"image": "0.png", "loss": False}, {"text": "what is it?", "loss": False}]
    picture = open_shard(shapes.root / "train/000000.tar")
    with ShardWriter(tmp_path / "train", header=ShardHeader(kind="documents")) as writer:
        files = {"0.png": picture.read(picture.keys[1], "0.png")}
        writer.write("a", {"segments": [*given, {"text": " a shape"}]}, files)
        writer.write("b", {"segments": [{"text": "first"}, {"image": "0.png"}, {"text": "then"}]}, files)
    shards = {"train": f"{tmp_path}/train/*.tar"}
    question, story = sorted(prompts_of(make(shapes, shards, task="text")), key=lambda prompt: prompt.key)
    assert [type(segment) for segment in question.segments] == [RawImage, TextSegment]
    assert question.answer == (" a shape",) and question.text == " a shape"
    assert [type(segment) for segment in story.segments] == [RawImage] and story.answer == ("first", "then")
    *_, story = sorted(prompts_of(make(shapes, shards, task="interleaved")), key=lambda prompt: prompt.key)
    picture, text = story.answer
    assert story.text == "first" and picture.pixels_CHW.shape[0] == 3 and text == "then" and story.reference is None


def test_a_picture_of_an_odd_ratio_is_answered_with_the_grids_of_its_document(tmp_path, shapes):
    """11 cells to 6 are the pixels of ratio 2: whoever took the ratio from them would draw on 10 to 6."""
    schedule = ScaleSchedule(sides=(1, 2, 3, 4, 5, 6, 7, 8), levels={64: 8}, stride=8)
    file = BytesIO()
    Image.new("RGB", (44, 88)).save(file, "PNG")
    with ShardWriter(tmp_path / "train", header=ShardHeader(kind="documents")) as writer:
        writer.write("a", {"segments": [{"text": "a tall one"}, {"image": "0.png"}]}, {"0.png": file.getvalue()})
    data = PromptDataModule(
        text_tokenizer=shapes.text_tokenizer, schedule=schedule, level=64, shards={"train": f"{tmp_path}/train/*.tar"}
    )
    (prompt,) = prompts_of(data)
    (picture,) = prompt.answer
    assert picture.pixels_CHW.shape == (3, 88, 48) and picture.grids[-1] == (11, 6)
    assert schedule.grids(64, prompt.aspect_ratio) == picture.grids != schedule.grids(64, 88 / 48)
