"""`python main.py plan`: its numbers are those of the real modules, without data, weights or devices."""

import json
from copy import deepcopy
from dataclasses import fields

import lightning as L
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from nextflow.lightning_modules.optim import freeze_for_alignment
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.main import main
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig
from nextflow.models.tokenizer.losses import LossWeights
from nextflow.models.transformer.config import DecoderConfig, TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.planning.plan import PlanOptions, ratios_of, scales_of
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.flops import DecoderShape
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

DECODER = {
    "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48, "rope_sections": [2, 1, 1],
    "max_scales": 4,
}  # fmt: skip
SCHEDULE = {"sides": [1, 2, 4], "levels": {16: 2, 32: 3}, "stride": 8, "base_grids": [[2, 8], [4, 4], [8, 2]]}
TRANSFORMER = {
    "trainer": {"devices": 4, "strategy": "ddp", "accumulate_grad_batches": 2, "precision": "32-true"},
    "model": {
        "class_path": "nextflow.lightning_modules.pretraining.PretrainingModule",
        "init_args": {"transformer": DECODER, "tokenizer": "nowhere.ckpt", "text_tokenizer": "nowhere"},
    },
    "data": {
        "class_path": "nextflow.datamodules.text_to_image.TextToImageDataModule",
        "init_args": {
            "shards": {"train": "nowhere/*.tar"}, "text_tokenizer": "nowhere", "codebook_size": 17, "level": 32,
            "batch_size": 3, "schedule": SCHEDULE,
        },
    },
}  # fmt: skip
SIZES = ["--plan.text_size", "300", "--plan.code_dim", "6", "--plan.text", "5"]


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])


def planned(capsys, folder, config, *arguments):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    main(["plan", "-c", str(path), "--json", *arguments])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, folder, config, *arguments):
    with pytest.raises(SystemExit) as stop:
        planned(capsys, folder, config, *arguments)
    return str(stop.value.code)


def transformer():
    config = TransformerConfig.resolve(
        DecoderConfig(**DECODER), text_size=300, codebook_size=17, code_dim=6, start_id=0, end_id=1
    )
    return Transformer(config)


@pytest.mark.parametrize("trainable", ["all", "alignment"])
def test_parameters_are_those_of_the_transformer(capsys, tmp_path, trainable):
    plan = planned(capsys, tmp_path, TRANSFORMER, *SIZES, f"--model.trainable={trainable}")
    model = transformer()
    if trainable == "alignment":
        freeze_for_alignment(model)
    assert plan["num_parameters"] == sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan["num_trained"] == trained
    assert {part["name"] for part in plan["parameters"]} == {name for name, _ in model.named_children()}
    assert plan["memory"]["weights"] == 4 * plan["num_parameters"]
    assert plan["memory"]["gradients"] == plan["memory"]["gradient_buckets"] == 4 * trained
    tensors = sum(p.requires_grad for p in model.parameters())
    assert plan["memory"]["optimizer"] == 8 * trained + 4 * tensors  # AdamW: two moments, and a step for each tensor


def test_flops_of_a_step_are_those_of_torchs_counter(capsys, tmp_path, uncounted):
    """The counter sees all L x L pairs, the plan only those that see each other; the difference is attention's alone."""
    (step,) = planned(capsys, tmp_path, TRANSFORMER, *SIZES)["steps"]
    model = transformer()
    model.set_attention("sdpa")
    codes = torch.zeros(21, dtype=torch.long)
    grids = ScaleSchedule(**SCHEDULE).grids(32)
    document = Document(segments=(TextSegment(ids=range(2, 7)), ImageSegment(grids=grids, codes=codes)))
    rows = lay_out([[document]] * 3, model.vocabulary, LayoutConfig())
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        model.cross_entropy(model(rows), rows.target_BL, rows.weight_BL).total.backward()
    unseen = rows.ids_BL.shape[0] * rows.ids_BL.shape[1] ** 2 - int(rows.visible_BLL().sum())
    assert step["positions"] == rows.ids_BL.numel() and step["targets"] == int(rows.num_targets)
    assert step["flops"] == counter.get_total_flops() - 3.5 * 4 * 2 * 32 * unseen
    assert step["logits"] == int(rows.num_targets) * model.vocabulary.size * 4


def test_stages_of_a_curriculum_and_packing(capsys, tmp_path):
    callbacks = [
        {
            "class_path": "nextflow.callbacks.resolution_curriculum.ResolutionCurriculum",
            "init_args": {"stages": [{"level": 16, "num_batches": 7}, {"level": 32, "num_batches": 9, "budget": 900}]},
        }
    ]
    config = deepcopy(TRANSFORMER)
    config["trainer"]["callbacks"] = callbacks
    shape = {field.name: DECODER[field.name] for field in fields(DecoderShape)}
    config["data"]["init_args"] |= {"packing": "fixed_budget", "budget": 500, "batch_size": 1, "transformer": shape}
    first, second = planned(capsys, tmp_path, config, *SIZES)["steps"]
    assert (first["level"], first["num_batches"], second["level"], second["num_batches"]) == (16, 7, 32, 9)
    # The budget, and not what documents are like, says how much work a batch is.
    assert second["flops"] / first["flops"] == pytest.approx(900 / 500)
    assert first["positions"] < 500


def test_missing_sizes_are_named(capsys, tmp_path):
    assert "give the number of its ids as --plan.text_size" in refusal(capsys, tmp_path, TRANSFORMER)
    config = deepcopy(TRANSFORMER)
    config["model"]["class_path"] = "lightning.pytorch.demos.boring_classes.BoringModel"
    config["model"]["init_args"] = {}
    assert "plan knows PretrainingModule and TokenizerModule" in refusal(capsys, tmp_path, config)


def test_the_7b_model_is_planned_from_its_sizes(capsys, tmp_path):
    config = {
        "trainer": {
            "devices": 8, "num_nodes": 128, "precision": "bf16-true",
            "callbacks": [
                {
                    "class_path": "nextflow.callbacks.fsdp_sharding.FSDPSharding",
                    "init_args": {"wrap": ["nextflow.models.transformer.block.Block"]},
                }
            ],
            "strategy": {
                "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
                "init_args": {"data_parallel_size": 1024, "tensor_parallel_size": 1},
            },
        },
        "model": {
            "class_path": "nextflow.lightning_modules.pretraining.PretrainingModule",
            "init_args": {"transformer": {}, "tokenizer": "nowhere.ckpt", "text_tokenizer": "nowhere"},
        },
        "data": {
            "class_path": "nextflow.datamodules.text_to_image.TextToImageDataModule",
            "init_args": {
                "shards": {"train": "nowhere/*.tar"}, "text_tokenizer": "nowhere", "codebook_size": 32768, "level": 1024,
                "batch_size": 1, "packing": "fixed_budget", "budget": 16384, "transformer": {},
            },
        },
    }  # fmt: skip
    plan = planned(capsys, tmp_path, config, "--plan.text_size", "152064", "--plan.activation_checkpointing", "true")
    decoder = 28 * (3584 * 36 * 128 + 36 * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944 + 2 * 3584)
    assert {part["name"]: part["total"] for part in plan["parameters"]}["blocks"] == decoder
    assert plan["memory"]["weights"] == 2 * plan["num_parameters"] / 1024
    assert plan["memory"]["optimizer"] == pytest.approx(4 * plan["num_parameters"] / 1024, rel=1e-3)
    assert [(image["level"], image["codes"]) for image in plan["images"]] == [(256, 900), (512, 3684), (1024, 10084)]


STAGES = {
    "pixel": {"semantic": 0.0, "adversarial": 0.5},
    "joint": {"semantic": 0.1},
    "decoder": {"semantic": 0.0},
}


@pytest.mark.parametrize(
    ("stage", "precision"), [("pixel", "32-true"), ("joint", "bf16-mixed"), ("decoder", "bf16-true")]
)
def test_parameters_are_those_of_the_tokenizer(capsys, tmp_path, stage, precision):
    pixel = {
        "width": 8,
        "multipliers": [1, 1, 1, 1],
        "num_blocks": 1,
        "latent_width": 8,
        "groups": 4,
        "attention": False,
    }
    semantic = {
        "width": 16, "mlp_width": 32, "num_layers": 3, "num_heads": 2, "num_patches": 16, "decoder_layers": 1,
        "decoder_width": 8, "decoder_heads": 2,
    }  # fmt: skip
    tokenizer = {
        "schedule": SCHEDULE, "codebook_size": 17, "semantic_dim": 4, "pixel_dim": 4, "semantic": semantic, "pixel": pixel,
        "decoder_capacity": 2 if stage == "decoder" else 1,
    }  # fmt: skip
    settings = {
        "tokenizer": tokenizer, "stage": stage, "losses": STAGES[stage],
        "semantic_encoder": "nowhere" if stage == "joint" else None,
        "discriminator": {"width": 4, "num_layers": 2, "groups": 2},
    }  # fmt: skip
    config = {
        "trainer": {"devices": 1},
        "model": {"class_path": "nextflow.lightning_modules.tokenizer.TokenizerModule", "init_args": settings},
        "data": {
            "class_path": "nextflow.datamodules.images.ImageDataModule",
            "init_args": {"shards": {"train": "nowhere"}, "levels": [16, 32], "schedule": SCHEDULE, "batch_size": 5},
        },
    }
    if stage == "joint":
        assert "--plan.semantic_from_config" in refusal(capsys, tmp_path, config)
    plan = planned(capsys, tmp_path, config, "--plan.semantic_from_config", "true", "--trainer.precision", precision)
    shape = TokenizerConfig(
        **{
            **tokenizer,
            "schedule": ScaleSchedule(**SCHEDULE),
            "semantic": SemanticConfig(**semantic),
            "pixel": PixelConfig(**pixel),
        }
    )
    losses = LossWeights(**{**STAGES[stage], "semantic": 0.0})  # a teacher wants the weights of its tower
    module = TokenizerModule(
        shape, stage=stage, losses=losses, discriminator=DiscriminatorConfig(width=4, num_layers=2, groups=2)
    )
    real = {name: sum(p.numel() for p in part.parameters()) for name, part in module.tokenizer.named_children()}
    parts = {part["name"]: part for part in plan["parameters"]}
    assert {name.removeprefix("tokenizer."): part["total"] for name, part in parts.items() if "." in name} == real
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if stage == "joint":
        trained += real["semantic_decoder"]
        tower = sum(p.numel() for p in module.tokenizer.semantic_encoder.tower.parameters())
        assert parts["teacher"] == {"name": "teacher", "total": tower, "trained": 0}
    assert plan["num_trained"] == trained
    assert ("discriminator" in parts) == (stage == "pixel")
    size = 2 if precision == "bf16-true" else 4
    assert plan["memory"]["optimizer"] == pytest.approx(2 * size * trained, rel=0.05)
    assert plan["memory"]["activations"] > 0
    assert [(image["level"], image["pixels"], image["codes"]) for image in plan["images"]] == [
        (16, [16, 16], 5),
        (32, [32, 32], 21),
    ]


def test_sizes_come_from_the_files_where_they_are_there(capsys, tmp_path):
    schedule = ScaleSchedule(**SCHEDULE)
    text_tokenizer = train_text_tokenizer(["a red dog", "two blue cats"], tmp_path / "text", size=300)
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    shape = TokenizerConfig(schedule=schedule, codebook_size=13, pixel_dim=7, semantic=None, pixel=pixel)
    module = TokenizerModule(shape, stage="pixel")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "tokenizer.ckpt")
    settings = {
        "transformer": DECODER, "tokenizer": str(tmp_path / "tokenizer.ckpt"), "text_tokenizer": str(tmp_path / "text"),
    }  # fmt: skip
    config = {
        "model": {**TRANSFORMER["model"], "init_args": settings},
        "data": {
            "class_path": "nextflow.datamodules.prompts.PromptDataModule",
            "init_args": {
                "prompts": ["a"],
                "level": 32,
                "schedule": SCHEDULE,
                "text_tokenizer": str(tmp_path / "text"),
            },
        },
    }
    plan = planned(capsys, tmp_path, config)
    parts = {part["name"]: part["total"] for part in plan["parameters"]}
    assert parts["token_embedding"] == 32 * text_tokenizer.size
    assert parts["code_embedding"] == 13 * 7
    assert list(plan["memory"]) == ["weights"] and plan["steps"] == []  # prompts do not train


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_explains_the_plan_alone(capsys, words):
    main(["plan", *words])
    text = capsys.readouterr().out
    assert "before it is launched" in text and "--json" in text and "main.py fit --help" in text
    assert all(f"--plan.{field.name}" in text for field in fields(PlanOptions))
    assert len(text.splitlines()) < 60


def test_several_configs_and_overrides_compose_as_in_fit(capsys, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"trainer": {"devices": 2}, "data": {"init_args": {"batch_size": 6}}}))
    first = planned(capsys, tmp_path, TRANSFORMER, *SIZES)
    second = planned(capsys, tmp_path, TRANSFORMER, "-c", str(more), *SIZES, "--model.transformer.num_layers", "1")
    assert (first["run"]["devices"], second["run"]["devices"]) == (4, 2)
    assert second["steps"][0]["positions"] == 2 * first["steps"][0]["positions"]
    parts = [{part["name"]: part["total"] for part in plan["parameters"]} for plan in (first, second)]
    assert parts[0]["blocks"] == 2 * parts[1]["blocks"]


def test_tables_are_printed(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TRANSFORMER))
    main(["plan", "-c", str(path), *SIZES, "--trainer.devices", "2"])
    text = capsys.readouterr().out
    assert "2 device(s), ddp" in text
    assert all(
        word in text for word in ("Parameters", "optimiser state", "never made", "One generated image", "aspect ratio")
    )


def test_scales_and_ratios_are_those_of_the_schedule():
    schedule = ScaleSchedule.nextflow()
    scales = scales_of(schedule)
    assert [scale.codes_so_far for scale in scales if scale.level] == [900, 3684, 10084]
    ratios = ratios_of(schedule)
    assert len(ratios) == 41
    assert ratios[0].codes == {level: schedule.num_codes(level, 0.25) for level in (256, 512, 1024)}
    assert ratios[0].pixels[1024] == (512, 2048)
