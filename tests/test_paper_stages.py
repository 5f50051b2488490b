"""The six stages of the 7B transformer (paper, table 2): its values, the figures of their lab notes; all of them are built."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from nextflow.datamodules.arrangements import AsStored
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.main import cli, main
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.block import Block
from nextflow.models.transformer.config import DecoderConfig
from nextflow.models.transformer.head import SingleHead
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "nextflow_7b"
# Level, learning rate, millions of samples of each kind, trillions of tokens.
TABLE_2: dict[str, tuple[int, float, dict[str, float], float]] = {
    "alignment": (256, 1e-3, {"text_to_image": 5, "image_to_text": 5}, 0.01),
    "pretrain_256": (256, 1e-4, {"text": 662, "text_to_image": 1891, "image_to_text": 520, "interleaved": 147}, 3.4),
    "pretrain_512": (512, 1e-4, {"text": 700, "text_to_image": 345, "editing": 20, "interleaved": 5}, 1.8),
    "pretrain_1024": (1024, 1e-4, {"text": 47, "text_to_image": 10, "editing": 2, "interleaved": 0.5}, 0.2),
    "continued_1024": (1024, 5e-5, {"text": 47, "text_to_image": 9, "editing": 2}, 0.2),
    "sft_1024": (1024, 1e-5, {"dialogues": 5, "text_to_image": 1, "editing": 0.1}, 0.02),
}
STAGES = list(TABLE_2)


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])


def words(stage: str) -> list[str]:
    return ["-c", str(FOLDER / "transformer.yaml"), "-c", str(FOLDER / f"{stage}.yaml")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for the files that the configs name: a text tokenizer, and an image tokenizer of the same codebook size."""
    folder = tmp_path_factory.mktemp("files")
    train_text_tokenizer(["a red dog"], folder / "weights" / "Qwen2.5-VL-7B-Instruct", size=300)
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    shape = TokenizerConfig(schedule=ScaleSchedule.nextflow(), codebook_size=32768, semantic=None, pixel=pixel)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    trainer.strategy.connect(TokenizerModule(shape, stage="pixel"))
    trainer.save_checkpoint(folder / "runs" / "nextflow_7b" / "tokenizer_decoder" / "last.ckpt")
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_lab_note_has_the_figures_of_the_plan(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *words(stage), "--plan.text_size", "151665", "--json"])
    plan = json.loads(capsys.readouterr().out)
    (step,) = plan["steps"]
    lines = (FOLDER / f"{stage}.yaml").read_text().splitlines()
    note = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    devices, memory = plan["run"]["devices"], plan["memory"]
    tokens = step["positions"] * devices * step["num_batches"] / 1e12
    for figure in (
        f"Meant for {devices:,} GPUs",
        f"{plan['num_parameters']:,} parameters",
        "all of them train" if stage != "alignment" else f"of which {plan['num_trained']:,} train",
        f"{sum(memory.values()) / 1e9:.1f} GB on each GPU",
        f"{memory['activations'] / 1e9:.1f} of them activations",
        f"{step['positions']:,.0f} positions",
        f"{step['flops'] / 1e15:.2f} PFLOPs, {step['model_flops'] / 1e15:.2f} of them the model's",
        f"the stage has {tokens:.2g}T positions",
    ):
        assert figure in note, figure
    level, _, _, told = TABLE_2[stage]
    assert step["level"] == level
    # The table's last two rows round 0.15 and 0.014 up, by its own numbers of samples.
    assert told / 1.5 < tokens < told * 1.05
    assert plan["run"]["activation_checkpointing"] and sum(memory.values()) < 60e9


@pytest.mark.parametrize("stage", STAGES)
def test_stage_is_built_with_the_papers_values(stage: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: trainer, callbacks, data, and the transformer without memory for its weights."""
    monkeypatch.chdir(files)
    built: Any = cli([*words(stage), "--trainer.accelerator", "cpu"], run=False)
    level, rate, weights, _ = TABLE_2[stage]
    data, module, trainer = built.datamodule, built.model, built.trainer
    assert data.level == level and data.layout.alpha == (0.0 if level == 256 else 0.9)
    assert {name: source.weight for name, source in data.sources.items()} == weights
    assert data.packing == "fixed_budget" and data.schedule == ScaleSchedule.nextflow()
    group = module.optimizer_factory([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (rate, (0.9, 0.95), 0.1)
    assert type(trainer.strategy).__name__ == "ModelParallelStrategy"
    devices = trainer.num_nodes * trainer.num_devices
    config = yaml.safe_load((FOLDER / "transformer.yaml").read_text())["trainer"]["strategy"]["init_args"]
    assert built.config.trainer.strategy.init_args.data_parallel_size == devices
    assert config["save_distributed_checkpoint"] is True
    if "interleaved" in data.sources:
        assert data.sources["interleaved"].arrange == AsStored(max_images=3 if level == 1024 else 5)

    with torch.device("meta"):
        module.configure_model()
    model = module.transformer
    assert all(parameter.is_meta for parameter in model.parameters())
    shape = DecoderConfig()
    assert (model.config.width, model.config.num_layers, model.config.mlp_width) == (3584, 28, 18944)
    assert {name: getattr(model.config, name) for name in vars(shape)} == vars(shape)
    sharding = next(one for one in trainer.callbacks if type(one).__name__ == "FSDPSharding")
    assert sharding.classes == (Block, SingleHead)
    assert sum(isinstance(part, sharding.classes) for part in model.modules()) == 28 + 1
    blocks_train = all(parameter.requires_grad for parameter in model.blocks.parameters())
    assert blocks_train == (stage != "alignment")


def test_each_stage_starts_from_the_one_before() -> None:
    written = {stage: yaml.safe_load((FOLDER / f"{stage}.yaml").read_text()) for stage in STAGES}
    base = yaml.safe_load((FOLDER / "transformer.yaml").read_text())
    starts = [written[stage]["model"]["init_args"]["initialize_from"] for stage in STAGES]
    loggers = [written[stage]["trainer"]["logger"]["init_args"] for stage in STAGES]
    ends = [f"{logger['save_dir']}/{logger['name']}/last.ckpt" for logger in loggers]
    assert starts == [base["model"]["init_args"]["text_tokenizer"], *ends[:-1]]


def test_supervised_fine_tuning_trains_on_responses_alone(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    built: Any = cli([*words("sft_1024"), "--trainer.accelerator", "cpu"], run=False)
    sources = built.datamodule.sources
    assert not sources["text_to_image"].arrange.text_loss and not sources["editing"].arrange.text_loss
    assert not sources["editing"].arrange.source_loss
