"""Scene rewards: the scene itself is read back right, other scenes are not, and a single fault costs what it should."""

from copy import deepcopy

import pytest
import torch

from nextflow.rewards.scene import SceneReward
from nextflow.rewards.scene_reader import scene_reader


def rotate(items):
    return [*items[1:], items[0]]


CHANCE = {"drawings": 0.1, "count": 0.7, "colour": 0.3, "position": 0.1, "background": 0.7}


def test_true_scenes_score_one_and_others_chance(scenes):
    rewards = {aspect: SceneReward(scenes.drawings, aspect) for aspect in CHANCE}
    shuffled = rotate(scenes.images)
    of_true = {aspect: reward(scenes.images, [""] * 20, scenes.metadata) for aspect, reward in rewards.items()}
    of_shuffled = {aspect: reward(shuffled, [""] * 20, scenes.metadata) for aspect, reward in rewards.items()}
    for aspect, chance in CHANCE.items():
        # A few drawings of twelve pixels are alike: a basketball is an orange circle with lines.
        assert of_true[aspect].nanmean() >= 0.95, aspect
        assert of_shuffled[aspect].nanmean() <= chance, aspect
        assert torch.equal(of_true[aspect].isnan(), of_shuffled[aspect].isnan())


def test_a_reading_names_drawings_and_boxes(scenes):
    reader = scene_reader(scenes.drawings)
    for reading, known in zip(reader.read(scenes.images[:5]), scenes.metadata):
        if len(reading.found) != len(known["objects"]):
            continue
        height, width = known["size"]
        for found in reading.found:
            left, top, right, bottom = (side * size for side, size in zip(found.box, (width, height, width, height)))
            near = [
                thing["noun"]
                for thing in known["objects"]
                if max(abs(a - b) for a, b in zip(thing["box"], (left, top, right, bottom))) <= 4
            ]
            assert reader.facts[found.hexcode]["noun"] in near


def test_faults_cost_their_aspect_alone(scenes):
    """The same picture against a scene that asks for another drawing, another number, another place."""
    index = next(i for i, known in enumerate(scenes.metadata) if known["layout"] == "pair")
    image, known = [scenes.images[index]], scenes.metadata[index]

    def score(aspect, asked):
        return float(SceneReward(scenes.drawings, aspect)(image, [""], [asked]))

    assert score("drawings", known) == score("position", known) == score("count", known) == 1
    other = deepcopy(known)
    other["objects"][0]["hexcode"] = next(code for code in scene_reader(scenes.drawings).hexcodes if code != "1F408")
    assert score("drawings", other) == 0.5 and score("position", other) == 0.5 and score("count", other) == 1
    swapped = deepcopy(known)
    first, second = swapped["objects"]
    first["box"], second["box"] = second["box"], first["box"]
    assert score("position", swapped) == 0 and score("drawings", swapped) == 1
    fewer = deepcopy(known)
    del fewer["objects"][1]
    assert score("count", fewer) == 0 and score("drawings", fewer) == 0.5


def test_prompts_that_are_no_scenes_have_no_score(scenes):
    reward = SceneReward(scenes.drawings, "drawings")
    scores = reward(scenes.images[:2], ["", ""], [{"caption": "a cat"}, scenes.metadata[1]])
    assert scores.isnan().tolist() == [True, False]
    assert reward(scenes.images[:1], [""], [{}]).isnan().all()


def test_masks_are_the_boxes(scenes):
    (mask,) = SceneReward(scenes.drawings).masks(scenes.images[:1], [""], scenes.metadata[:1])
    assert mask.shape == scenes.images[0].shape[1:]
    left, top, right, bottom = scenes.metadata[0]["objects"][0]["box"]
    assert mask[top:bottom, left:right].all() and not mask.all()


def test_missing_drawings_name_their_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nextflow\.datamodules\.openmoji\.tiles --output"):
        SceneReward(str(tmp_path / "none"))([torch.zeros(3, 8, 8, dtype=torch.uint8)], [""], [{"objects": []}])
