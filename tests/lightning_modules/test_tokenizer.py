"""Three training stages run, hand over, freeze what they should, count steps as batches, and predict codes."""

from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from transformers import Siglip2Config, Siglip2Model

from nextflow.lightning_modules.tokenizer import TokenizerModule, load_tokenizer, to_signed
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig
from nextflow.models.tokenizer.losses import LossWeights
from nextflow.models.tokenizer.quantizer import Correction
from nextflow.sequence.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8)
PIXEL = PixelConfig(layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4)
CONFIG = TokenizerConfig(
    schedule=SCHEDULE,
    codebook_size=32,
    semantic_dim=8,
    pixel_dim=4,
    pixel=PIXEL,
    semantic=SemanticConfig(  # of another size than the folder below, which counts
        width=8,
        mlp_width=8,
        num_layers=1,
        num_heads=2,
        num_patches=4,
        decoder_layers=1,
        decoder_width=16,
        decoder_heads=2,
    ),
)
ADVERSARIAL = {
    "losses": LossWeights(adversarial=0.5),
    "discriminator": DiscriminatorConfig(width=8, num_layers=1, groups=4),
}


def _batch(index: int) -> SimpleNamespace:
    level = (16, 32)[index % 2]
    generator = torch.Generator().manual_seed(index)
    images = torch.randint(0, 256, (4, 3, level, level), dtype=torch.uint8, generator=generator)
    keys = [f"{index}{letter}" for letter in "abcd"]
    return SimpleNamespace(
        images=images,
        grids=SCHEDULE.grids(level),
        level=level,
        aspect_ratio=1.0,
        keys=keys,
        names=["0.png"] * 4,
        records=[{"segments": [{"image": "0.png"}]} for _ in keys],
        captions=["a", "b", "a", "c"],
        split="train",
    )


class _Batches(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> SimpleNamespace:
        return _batch(index)


LOADER = torch.utils.data.DataLoader(_Batches(), batch_size=None)


def _trainer(folder, **options) -> L.Trainer:
    options = {"max_steps": 3, "precision": "bf16-mixed", **options}
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def _fit(module, folder, name, **options) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    trainer = _trainer(folder, **options)
    trainer.fit(module, LOADER, LOADER)
    trainer.save_checkpoint(folder / name)
    return trainer


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A SigLIP 2 folder and the checkpoints pixel.ckpt and joint.ckpt."""
    folder = tmp_path_factory.mktemp("stages")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    siglip = Siglip2Config(
        text_config={**tower, "vocab_size": 20, "bos_token_id": None, "eos_token_id": None},
        vision_config={**tower, "patch_size": 8, "num_patches": 4},
    )
    Siglip2Model(siglip).save_pretrained(folder / "siglip2")
    L.seed_everything(0, verbose=False)
    _fit(TokenizerModule(CONFIG, stage="pixel"), folder, "pixel.ckpt")
    joint = {"init_from": str(folder / "pixel.ckpt"), "semantic_encoder": str(folder / "siglip2")}
    _fit(TokenizerModule(CONFIG, stage="joint", **joint), folder, "joint.ckpt")
    return folder


def test_pixel_stage_has_no_semantic_branch_and_logs_metrics(tmp_path):
    trainer = _fit(TokenizerModule(CONFIG, stage="pixel"), tmp_path, "x.ckpt")
    logged = trainer.callback_metrics
    names = {
        "train/loss",
        "train/loss_mse",
        "train/loss_codebook",
        "train/loss_commitment",
        "train/loss_residual",
        "val/psnr",
        "val/psnr/16",
        "val/psnr/32",
        "val/ssim",
    }
    assert names | {"tokenizer/usage", "tokenizer/usage/scale_03", "tokenizer/perplexity/scale_01"} <= set(logged)
    assert "train/loss_semantic" not in logged
    tokenizer = load_tokenizer(tmp_path / "x.ckpt")
    assert tokenizer.config.semantic is None
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())


def test_validation_is_psnr_of_decoded_codes(stages, tmp_path):
    module = TokenizerModule.load_from_checkpoint(stages / "joint.ckpt")
    logged = _trainer(tmp_path, precision="32-true").validate(module, LOADER, verbose=False)[0]
    values = []
    for batch in (_batch(0), _batch(2)):  # the two batches of level 16
        codes = module.tokenizer.encode(to_signed(batch.images), batch.grids).target_codes_BN
        decoded = (module.tokenizer.decode(codes, batch.grids).clamp(-1, 1) + 1) / 2
        values += (-10 * (decoded - batch.images / 255).square().mean(dim=(1, 2, 3)).log10()).tolist()
    assert logged["val/psnr/16"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_joint_stage_starts_from_pixel_stage_and_semantic_encoder(stages, tmp_path):
    pixel = load_tokenizer(stages / "pixel.ckpt")
    module = TokenizerModule(
        CONFIG,
        stage="joint",
        init_from=str(stages / "pixel.ckpt"),
        semantic_encoder=str(stages / "siglip2"),
        generator_optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )
    trainer = _fit(module, tmp_path, "x.ckpt", precision="32-true")
    assert "train/loss_semantic" in trainer.callback_metrics
    for name in ("pixel_encoder.to_code.weight", "pixel_decoder.to_pixels.weight", "quantizer.pixel_codebook"):
        assert torch.equal(module.tokenizer.get_parameter(name), pixel.get_parameter(name)), name
    assert module.tokenizer.config.semantic.width == 16  # of the folder, not of the configuration
    for ours, teacher in zip(
        module.tokenizer.semantic_encoder.tower.parameters(), module.objective.teacher.parameters()
    ):
        assert torch.equal(ours, teacher) and ours.requires_grad and not teacher.requires_grad


@pytest.mark.parametrize("adversarial", [False, True])
def test_decoder_stage_changes_the_decoder_alone(stages, tmp_path, adversarial):
    module = TokenizerModule(
        replace(CONFIG, decoder_capacity=2),
        stage="decoder",
        init_from=str(stages / "joint.ckpt"),
        semantic_encoder=str(stages / "siglip2"),
        **(ADVERSARIAL if adversarial else {}),
    )
    module.train()
    assert module.tokenizer.pixel_decoder.training and not module.tokenizer.quantizer.training
    _fit(module, tmp_path, "decoder.ckpt")
    before, after = load_tokenizer(stages / "joint.ckpt"), load_tokenizer(tmp_path / "decoder.ckpt")
    assert before.fingerprint() == after.fingerprint()
    for name, value in before.state_dict().items():
        if not name.startswith("pixel_decoder."):
            assert torch.equal(after.state_dict()[name], value), name
    assert after.pixel_decoder.to_pixels.in_channels == 2 * before.pixel_decoder.to_pixels.in_channels


def test_decoder_stage_starts_with_the_joint_stages_pictures(stages, tmp_path):
    module = TokenizerModule(
        replace(CONFIG, decoder_capacity=2),
        stage="decoder",
        init_from=str(stages / "joint.ckpt"),
        semantic_encoder=str(stages / "siglip2"),
        generator_optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
    )
    _fit(module, tmp_path, "x.ckpt", precision="32-true")
    joint, batch = load_tokenizer(stages / "joint.ckpt"), _batch(1)
    codes = joint.encode(to_signed(batch.images), batch.grids).target_codes_BN
    with torch.no_grad():
        grown = module.tokenizer.eval().decode(codes, batch.grids)
    torch.testing.assert_close(grown, joint.decode(codes, batch.grids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adversarial", [False, True])
def test_steps_are_batches_and_the_learning_rate_follows_them(tmp_path, adversarial):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    options = {**ADVERSARIAL, "discriminator_start": 1} if adversarial else {}
    module = TokenizerModule(CONFIG, stage="pixel", warmup_steps=2, **options)
    trainer = _fit(module, tmp_path, "x.ckpt", max_steps=5, callbacks=[Rates()])
    assert trainer.global_step == 5 and len(rates) == 5
    expected = [0.5e-4, 1e-4, 1e-4, 0.75e-4, 0.25e-4]
    for step, values in enumerate(rates):
        assert values == pytest.approx([expected[step]] * (2 if adversarial else 1))


def test_discriminator_learns_from_its_start_on(tmp_path):
    module = TokenizerModule(CONFIG, stage="pixel", discriminator_start=2, **ADVERSARIAL)
    before = [parameter.clone() for parameter in module.discriminator.parameters()]
    _fit(module, tmp_path, "x.ckpt", max_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, module.discriminator.parameters()))
    module = TokenizerModule(CONFIG, stage="pixel", discriminator_start=2, **ADVERSARIAL)
    before = [parameter.clone() for parameter in module.discriminator.parameters()]
    _fit(module, tmp_path, "x.ckpt", max_steps=3)
    assert not any(torch.equal(a, b) for a, b in zip(before, module.discriminator.parameters()))


@pytest.mark.parametrize("adversarial", [False, True])
def test_resumed_run_equals_straight_run(tmp_path, adversarial):
    options = ADVERSARIAL if adversarial else {}
    config = replace(CONFIG, revive_interval=2, usage_decay=0.5, revive_below=0.5)

    def module():
        L.seed_everything(0, verbose=False)
        return TokenizerModule(config, stage="pixel", total_steps=6, **options)

    straight, first, second = module(), module(), module()
    _fit(straight, tmp_path, "straight.ckpt", max_steps=6)
    _fit(first, tmp_path, "half.ckpt", max_steps=3)
    _trainer(tmp_path, max_steps=6).fit(second, LOADER, LOADER, ckpt_path=tmp_path / "half.ckpt")
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_run_outlives_the_stage_it_began_with(stages, tmp_path):
    """A resumed run takes nothing from it; one that begins needs it."""

    def module(path):
        L.seed_everything(0, verbose=False)
        return TokenizerModule(CONFIG, stage="pixel", total_steps=6, init_from=str(path))

    straight = module(stages / "pixel.ckpt")
    _fit(straight, tmp_path, "straight.ckpt", max_steps=6)
    _fit(module(stages / "pixel.ckpt"), tmp_path, "half.ckpt", max_steps=3)
    resumed, gone = module(tmp_path / "gone.ckpt"), module(tmp_path / "gone.ckpt")
    _trainer(tmp_path, max_steps=6).fit(resumed, LOADER, LOADER, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.trainer.global_step == 6
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(FileNotFoundError, match=r"init_from: .*gone\.ckpt does not exist"):
        _trainer(tmp_path).fit(gone, LOADER)


def test_scale_dropout_reaches_the_quantiser(tmp_path):
    module = TokenizerModule(CONFIG, stage="pixel")
    seen = []
    module.tokenizer.quantizer.register_forward_hook(lambda _, args, output: seen.append(output.indices))
    module.scale_keep = (True, False, True)
    _fit(module, tmp_path, "x.ckpt", max_steps=2, limit_val_batches=0)
    assert (seen[1][:, 1:5] == -1).all() and (seen[1][:, 5:] >= 0).all()


def test_predict_returns_codes(stages, tmp_path):
    module = TokenizerModule.load_from_checkpoint(stages / "joint.ckpt")
    predictions = _trainer(tmp_path, precision="32-true").predict(module, LOADER)
    assert [prediction.level for prediction in predictions] == [16, 32, 16]
    batch = _batch(1)
    expected = module.tokenizer.encode(to_signed(batch.images), batch.grids).target_codes_BN
    assert torch.equal(predictions[1].codes_BN, expected)
    assert predictions[1].keys == batch.keys and predictions[1].corrected is None

    module.correction = Correction(fraction=1.0, top_k=8, temperature=100.0)
    first = _trainer(tmp_path, precision="32-true").predict(module, LOADER)
    second = _trainer(tmp_path, precision="32-true").predict(module, LOADER)
    assert (first[1].corrected.input_N != first[1].codes_BN).any()
    assert torch.equal(first[1].codes_BN, expected)  # the plain codes stay beside them
    assert all(torch.equal(a.corrected.input_N, b.corrected.input_N) for a, b in zip(first, second))


def test_errors_name_the_key(stages, tmp_path):
    with pytest.raises(ValueError, match="init_from"):
        _fit(TokenizerModule(CONFIG, stage="decoder"), tmp_path, "x.ckpt")
    other = replace(CONFIG, codebook_size=64)
    module = TokenizerModule(
        other, stage="joint", init_from=str(stages / "pixel.ckpt"), semantic_encoder=str(stages / "siglip2")
    )
    with pytest.raises(ValueError, match=r"tokenizer.codebook_size: 64 here, 32 there"):
        _fit(module, tmp_path, "x.ckpt")
    with pytest.raises(ValueError, match="--ckpt_path"):
        _trainer(tmp_path).predict(TokenizerModule(CONFIG, stage="pixel"), LOADER)
    with pytest.raises(FileNotFoundError, match=r"tokenizer: .*does not exist"):
        load_tokenizer(tmp_path / "nothing.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"tokenizer: .*TokenizerModule"):
        load_tokenizer(tmp_path / "other.ckpt")
