"""`main.py export`: a checkpoint becomes a folder whose pipeline draws what the module would."""

import lightning as L
import pytest
import torch
import yaml

from nextflow.generation.engine import generate
from nextflow.generation.pipeline import NextFlowPipeline
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.main import main
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.config import DecoderConfig
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8, base_grids=((2, 8), (4, 4), (8, 2)))
DECODER = {
    "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48,
    "rope_sections": [2, 1, 1], "max_scales": 4, "init_std": 0.2,
}  # fmt: skip


def save(module, path) -> None:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two tokenizers, a module trained with the first, its checkpoint, and its config."""
    folder = tmp_path_factory.mktemp("export")
    train_text_tokenizer(["a red dog", "two blue cats"], folder / "text", size=300)
    for seed, name in enumerate(("tokenizer", "other")):
        torch.manual_seed(seed)
        pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
        config = TokenizerConfig(schedule=SCHEDULE, codebook_size=17, pixel_dim=4, semantic=None, pixel=pixel)
        save(TokenizerModule(config, stage="pixel"), folder / f"{name}.ckpt")
    module = PretrainingModule(
        transformer=DecoderConfig(**DECODER),
        tokenizer=str(folder / "tokenizer.ckpt"),
        text_tokenizer=str(folder / "text"),
    )
    module.configure_model()
    module.trained_levels = {32}
    save(module, folder / "last.ckpt")
    settings = {
        "transformer": DECODER, "tokenizer": str(folder / "tokenizer.ckpt"), "text_tokenizer": str(folder / "text"),
        "guidance": 1.5, "sampling": {"top_k": [4, 2], "greedy": False},
    }  # fmt: skip
    model = {"class_path": "nextflow.lightning_modules.pretraining.PretrainingModule", "init_args": settings}
    grids = [list(grid) for grid in SCHEDULE.base_grids]
    schedule = {"sides": [1, 2, 4], "levels": {16: 2, 32: 3}, "stride": 8, "base_grids": grids}
    prompts = {"text_tokenizer": str(folder / "text"), "level": 32, "prompts": ["a red dog"], "schedule": schedule}
    data = {"class_path": "nextflow.datamodules.prompts.PromptDataModule", "init_args": prompts}
    (folder / "predict.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    return folder, module


def export(folder, *more: str) -> None:
    main(["export", "-c", str(folder / "predict.yaml"), "--output", str(folder / "hub"), *more])


def test_the_exported_pipeline_draws_what_the_module_draws(run):
    folder, module = run
    export(folder, "--ckpt_path", str(folder / "last.ckpt"))
    pipeline = NextFlowPipeline.from_pretrained(folder / "hub")
    assert pipeline.guidance == 1.5 and pipeline.sampling.top_k == [4, 2] and pipeline.layout == module.layout
    assert pipeline.levels == (32,)
    request = pipeline.request("a red dog", seed=3)
    (answer,) = pipeline.generate(request)
    (result,) = generate(
        module.transformer, [request], layout=module.layout, tokenizer=module.tokenizer, sampling=pipeline.sampling
    )
    assert torch.equal(answer.result.codes, result.codes) and torch.equal(answer.result.image, result.image)


def test_predict_refuses_a_level_that_was_not_trained(run):
    folder, _ = run
    words = [
        "predict",
        "-c",
        str(folder / "predict.yaml"),
        "--ckpt_path",
        str(folder / "last.ckpt"),
        "--data.level",
        "16",
    ]
    words += ["--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    with pytest.raises(SystemExit, match=r"data\.level: pictures of level 16 .* trained at level 32 alone"):
        main(words)


def test_mistakes_name_the_option(run, capsys):
    folder, _ = run
    for words, message in (
        (["--ckpt_path", str(folder / "absent.ckpt")], "absent.ckpt"),
        ([], "export needs --ckpt_path"),
        (
            ["--ckpt_path", str(folder / "last.ckpt"), "--model.tokenizer", str(folder / "other.ckpt")],
            "name the tokenizer",
        ),
        (["--ckpt_path", str(folder / "last.ckpt"), "--weights", "ema"], "ema|EMA|average"),
    ):
        with pytest.raises(SystemExit) as caught:
            export(folder, *words)
        assert any(part in str(caught.value) for part in message.split("|")), caught.value
