"""The paper-scale tokenizer configs: built on the meta device, they have the sizes of their lab notes, the paper's values,
and a tower that the published SigLIP 2 checkpoint fits."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning import LightningDataModule, LightningModule
from torch import nn
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionConfig

from nextflow.models.tokenizer.semantic import SemanticTower, tower_weights
from nextflow.sequence.scales import ScaleSchedule

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "nextflow_7b"
STAGES = ("pixel", "joint", "decoder")


def _path(stage: str) -> Path:
    return FOLDER / f"tokenizer_{stage}.yaml"


@pytest.fixture(scope="module")
def built() -> dict[str, Namespace]:
    """Model (without memory for its weights) and data module of each stage, none of whose files are there."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    parser.add_subclass_arguments(LightningDataModule, "data")
    runs = {}
    for stage in STAGES:
        written = yaml.safe_load(_path(stage).read_text())
        config = parser.parse_object({"model": written["model"], "data": written["data"]})
        with torch.device("meta"):
            runs[stage] = parser.instantiate_classes(config)
    return runs


def _millions(module: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)


@pytest.mark.parametrize("stage", STAGES)
def test_sizes_are_those_of_the_lab_note(stage: str, built: dict[str, Namespace]) -> None:
    module: Any = built[stage].model
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    note = " ".join(line.lstrip("# ") for line in _path(stage).read_text().splitlines() if line.startswith("#"))
    noted = {name: float(millions) for name, millions in re.findall(r"(\w+) ([\d.]+) M\b", note)}
    parts = {name: _millions(part) for name, part in module.tokenizer.named_children()}
    teacher = {"has": _millions(module.tokenizer.semantic_encoder.tower)} if stage == "joint" else {}
    assert noted == {**parts, "discriminator": _millions(module.discriminator), **teacher}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_its_parts(stage: str, built: dict[str, Namespace]) -> None:
    module: Any = built[stage].model
    parameters = module.tokenizer.named_parameters()
    trained = {name.split(".")[0] for name, parameter in parameters if parameter.requires_grad}
    pixel = {"pixel_encoder", "pixel_decoder", "quantizer"}
    expected = {"pixel": pixel, "joint": pixel | {"semantic_encoder", "semantic_decoder"}, "decoder": {"pixel_decoder"}}
    assert trained == expected[stage]
    assert module.tokenizer.config.decoder_capacity == (2 if stage == "decoder" else 1)


@pytest.mark.parametrize("stage", STAGES)
def test_values_are_the_papers_or_its_parents(stage: str, built: dict[str, Namespace]) -> None:
    module: Any = built[stage].model
    data: Any = built[stage].data
    config, losses = module.tokenizer.config, module.losses
    assert config.schedule == data.schedule == ScaleSchedule.nextflow()
    assert data.levels == [256, 512, 1024]
    assert config.codebook_size == 32768 and config.pixel_dim == 8 and config.beta == 0.25
    assert (losses.mse, losses.perceptual, losses.adversarial, module.discriminator_start) == (1.0, 1.0, 0.5, 20000)
    assert (
        losses.semantic == (1.0 if stage == "joint" else 0.0)
        and losses.entropy == 0.0
        and not losses.adaptive_adversarial
    )
    if stage != "pixel":
        assert config.semantic_dim == 32 and config.semantic.hidden_state == -2
    assert (data.horizontal_flip, data.min_crop_scale, module.gradient_clip) == (True, 0.8, 1.0)
    for optimizer in (module.generator_optimizer, module.discriminator_optimizer):
        group = optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]
        assert (group["lr"], tuple(group["betas"])) == (1e-4, (0.9, 0.95))

    trainer = yaml.safe_load(_path(stage).read_text())["trainer"]
    assert trainer["num_nodes"] * trainer["devices"] * data.batch_size == 256
    dropout = [callback["init_args"] for callback in trainer["callbacks"] if "ScaleDropout" in callback["class_path"]]
    assert dropout == ([] if stage == "decoder" else [{"share": 0.5, "probability": 1.0}])


def test_each_stage_starts_from_the_one_before(built: dict[str, Namespace]) -> None:
    for stage, before in zip(STAGES[1:], STAGES):
        logger = yaml.safe_load(_path(before).read_text())["trainer"]["logger"]["init_args"]
        assert built[stage].model.init_from == f"{logger['save_dir']}/{logger['name']}/last.ckpt"


@pytest.mark.parametrize("class_name", ["Siglip2Model", "Siglip2VisionModel"])
def test_the_published_encoder_fits_the_tower(class_name: str, built: dict[str, Namespace]) -> None:
    """The so400m-patch16-naflex sizes as transformers builds them; both styles of keys."""
    so400m = Siglip2VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=16
    )
    tower: Any = built["joint"].model.tokenizer.semantic_encoder.tower
    with torch.device("meta"):
        model = Siglip2Model(Siglip2Config(vision_config=so400m, text_config={"num_hidden_layers": 1}))
        last = SemanticTower(built["joint"].model.tokenizer.config.semantic, 16)
    source = model if class_name == "Siglip2Model" else model.vision_model
    weights = tower_weights(tower, source.state_dict(), class_name)
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in last.state_dict().items()
    }
    assert len(tower.layers) == 26  # the second-to-last hidden state
