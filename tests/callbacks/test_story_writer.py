"""Stories become pictures, a line each, and a sheet."""

import json
from types import SimpleNamespace

import torch
from PIL import Image

from nextflow.callbacks.story_writer import StoryWriter
from nextflow.generation.requests import Generated


def test_parts_keep_their_order(tmp_path):
    red, blue = torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    stories = [
        Generated(index=1, prompt="Two.", parts=(blue, "Then red.", red, "The end.")),
        Generated(index=0, prompt="One.", seed=7, parts=("Nothing to see.",)),
    ]
    writer, trainer, module = (
        StoryWriter(str(tmp_path / "out")),
        SimpleNamespace(is_global_zero=True),
        SimpleNamespace(),
    )
    writer.on_predict_start(trainer, module)
    writer.write_on_batch_end(trainer, module, stories, None, None, 0, 0)
    writer.on_predict_end(trainer, module)
    first, second = map(json.loads, (tmp_path / "out" / "stories.jsonl").read_text().splitlines())
    assert first == {
        "index": 0, "prompt": "One.", "seed": 7, "key": "", "split": "", "parts": [{"text": "Nothing to see."}]
    }  # fmt: skip
    assert second["parts"] == [
        {"image": "00001_0.png"}, {"text": "Then red."}, {"image": "00001_1.png"}, {"text": "The end."}
    ]  # fmt: skip
    assert Image.open(tmp_path / "out" / "00001_1.png").getpixel((0, 0)) == (255, 0, 0)
    assert (tmp_path / "out" / "grid.png").is_file() and not list((tmp_path / "out").glob("*.partial"))
