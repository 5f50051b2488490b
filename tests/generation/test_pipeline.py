"""A folder gives back what was saved, and the pipeline draws what the engine draws."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from nextflow.generation.engine import generate
from nextflow.generation.pipeline import NextFlowPipeline
from nextflow.generation.sampling import SamplingConfig
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.text_tokenizer import train_text_tokenizer

WORDS = ["a red apple", "a blue ball", "make it green", "the end of the story"]


@pytest.fixture(scope="module")
def pipeline(studio, tmp_path_factory) -> NextFlowPipeline:
    torch.manual_seed(0)
    pixel = PixelConfig(
        layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4
    )
    tokenizer = Tokenizer(
        TokenizerConfig(schedule=studio.schedule, codebook_size=24, pixel_dim=4, pixel=pixel, semantic=None)
    ).requires_grad_(False)
    text_tokenizer = train_text_tokenizer(WORDS, tmp_path_factory.mktemp("text"), 300)
    config = TransformerConfig(
        text_size=text_tokenizer.size, codebook_size=24, start_id=text_tokenizer.start_id, end_id=text_tokenizer.end_id,
        code_dim=tokenizer.code_dim, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=48,
        rope_sections=(2, 3, 3), init_std=0.2, max_scales=7,
    )  # fmt: skip
    return NextFlowPipeline(
        transformer=Transformer(config),
        tokenizer=tokenizer,
        text_tokenizer=text_tokenizer,
        layout=LayoutConfig(rope_range=8.0, alpha=0.9),
        sampling=SamplingConfig(top_k=[8, 4], text_top_k=20),
        guidance=2.0,
    )


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "model"
    pipeline.save_pretrained(path)
    return path


def photo(width: int = 90, height: int = 60) -> Image.Image:
    image = Image.new("RGB", (width, height), "navy")
    image.paste("orange", (0, 0, width // 2, height))
    return image


def test_a_folder_gives_back_everything(pipeline, folder):
    loaded = NextFlowPipeline.from_pretrained(folder)
    for ours, theirs in ((pipeline.transformer, loaded.transformer), (pipeline.tokenizer, loaded.tokenizer)):
        assert ours.config == theirs.config
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert (loaded.layout, loaded.sampling, loaded.guidance) == (pipeline.layout, pipeline.sampling, pipeline.guidance)
    requests = [pipeline.request("a red apple", seed=3), pipeline.request([photo(), "make it green"], level=32, seed=4)]
    for a, b in zip(pipeline.generate(requests), loaded.generate(requests)):
        assert torch.equal(a.result.codes, b.result.codes) and a.image.tobytes() == b.image.tobytes()
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: nextflow\n")


def test_loading_needs_no_lightning(folder):
    code = (
        "import sys; from nextflow.generation.pipeline import NextFlowPipeline as P;"
        f"P.from_pretrained({str(folder)!r}).generate('a red apple');"
        "sys.exit(any(name.split('.')[0] in ('lightning', 'pytorch_lightning') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


def test_every_task_by_words_and_pictures(pipeline):
    apple, photo_32 = "a red apple", pipeline.encode(photo(), 32)
    assert photo_32.grids == pipeline.schedule.grids(32, 60 / 90)
    assert pipeline.generate(apple)[0].image.size == (64, 64)
    wide = pipeline.request([photo(), photo(40, 40), "make it green"], level=32, aspect_ratio=0.55)
    assert pipeline.generate(wide)[0].image.size == (48, 24)
    (caption,) = pipeline.generate(pipeline.request(photo(), task="text", level=32, max_text_tokens=5))
    assert caption.image is None and caption.text == pipeline.text_tokenizer.decode(caption.result.text_ids)
    story = pipeline.request("the end", task="interleaved", level=32, max_images=2, max_text_tokens=3)
    (told,) = pipeline.generate(story)
    assert len(told.parts) == len(told.result.segments) and told.finished
    (thought,) = pipeline.generate(pipeline.request(apple, task="reasoning", level=32, max_text_tokens=3))
    assert isinstance(thought.parts[-1], Image.Image)
    previews = list(pipeline.stream(pipeline.request(apple, level=32, negative="a blue ball")))
    assert [preview.finished for preview in previews] == [False, False, False, True]


def test_requests_are_those_of_the_engine(pipeline):
    request = pipeline.request("a red apple", seed=5)
    (answer,) = pipeline.generate(request, logprobs=True)
    (result,) = generate(pipeline.transformer, [request], layout=pipeline.layout, sampling=pipeline.sampling)
    assert torch.equal(answer.result.codes, result.codes)
    assert answer.result.logprobs.shape == result.codes.shape


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    """To the last bit of its pixels: alone, among others of its size, and among others of any."""
    apples = [pipeline.request("a red apple", seed=seed) for seed in range(6)]
    others = [pipeline.request("a blue ball", level=32, aspect_ratio=0.55, seed=7), pipeline.request(photo(), seed=8)]
    together = pipeline.generate([*apples, *others])
    for request, answer in zip([*apples, *others], together):
        (alone,) = pipeline.generate(request)
        assert alone.image.tobytes() == answer.image.tobytes()
    assert [answer.image.tobytes() for answer in pipeline.generate(apples[:3])] == [
        answer.image.tobytes() for answer in together[:3]
    ]


def test_a_level_that_was_not_trained_is_refused(pipeline, folder, tmp_path):
    """The schedule has 32 and 64; a transformer of the first stage has seen 32 alone, and says so in its folder."""
    small = NextFlowPipeline(
        transformer=pipeline.transformer, tokenizer=pipeline.tokenizer, text_tokenizer=pipeline.text_tokenizer,
        layout=pipeline.layout, levels=(32,),
    )  # fmt: skip
    small.save_pretrained(tmp_path / "small")
    loaded = NextFlowPipeline.from_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="was trained at level 32 alone: ask for one of these, not for level 64"):
        loaded.request("a red apple", level=64)
    assert loaded.generate("a red apple")[0].image.size == (32, 32)
    assert "32 (4 scales)" in (tmp_path / "small/README.md").read_text()
    assert NextFlowPipeline.from_pretrained(folder).levels == (32, 64)


def test_details_and_masks_keep_the_rest_of_a_picture(pipeline):
    codes_N = pipeline.encode(photo(), 64).codes
    coarse = pipeline.coarse(photo(), 3)
    (varied,) = pipeline.generate(pipeline.request("a blue ball", given=coarse))
    kept = int((coarse.codes_N >= 0).sum())
    assert torch.equal(varied.result.codes[:kept], codes_N[:kept]) and not torch.equal(varied.result.codes, codes_N)
    mask = Image.new("1", (90, 60))
    mask.paste(1, (50, 0, 90, 60))
    outside = pipeline.outside(photo(), mask)
    (painted,) = pipeline.generate(pipeline.request("a blue ball", given=outside))
    kept_N = outside.codes_N >= 0
    assert 0 < int(kept_N.sum()) < len(kept_N) and torch.equal(painted.result.codes[kept_N], codes_N[kept_N])
    with pytest.raises(ValueError, match="they must be equal"):
        pipeline.outside(photo(), Image.new("1", (8, 8)))


def test_the_notebook_runs_from_top_to_bottom(folder, tmp_path, monkeypatch):
    """Its cells as they are, on the tiny model; jupyter itself is not needed."""
    notebook = Path(__file__).resolve().parents[2] / "notebooks" / "first_look.ipynb"
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6 and not any(cell["outputs"] for cell in cells)
    shown: list[Image.Image] = []
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shown.append))
    (tmp_path / "hub").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert len(shown) == 5 and all(image.height == 128 for image in shown)


def test_what_does_not_fit_is_refused(pipeline, folder, tmp_path):
    with pytest.raises(ValueError, match="level 128 does not exist; the schedule has 32, 64"):
        pipeline.request("a red apple", level=128)
    with pytest.raises(FileNotFoundError, match=r"main\.py export"):
        NextFlowPipeline.from_pretrained(tmp_path)

    def changed(name: str):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        return copy

    later = changed("later")
    config = json.loads((later / "config.json").read_text())
    (later / "config.json").write_text(json.dumps({**config, "format": 2}))
    with pytest.raises(ValueError, match="format 2; this version reads 'nextflow' up to format 1"):
        NextFlowPipeline.from_pretrained(later)
    other = changed("other")
    train_text_tokenizer(["something else"], other / "text_tokenizer", 290)
    with pytest.raises(ValueError, match="was trained with text_tokenizer"):
        NextFlowPipeline.from_pretrained(other)
    wider = changed("wider")
    (wider / "config.json").write_text(
        json.dumps({**config, "transformer": {**config["transformer"], "mlp_width": 64}})
    )
    with pytest.raises(ValueError, match=r"mlp.* has shape .*; config.json asks for shape"):
        NextFlowPipeline.from_pretrained(wider)
    cut = changed("cut")
    (cut / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not complete"):
        NextFlowPipeline.from_pretrained(cut)
