"""What a stage freezes is, after real training steps, bit for bit what it was: weights, buffers, statistics, teachers.

The steps run with scale dropout, revival of dead entries, a discriminator, LPIPS, validation in between, with and without
calls of `module.train()` that try to switch everything to training mode. Lightning itself never calls it.
"""

from dataclasses import replace

import lightning as L
import pytest
import torch

from nextflow.callbacks.scale_dropout import ScaleDropout
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig
from nextflow.models.tokenizer.losses import LossWeights

LOSSES = LossWeights(l1=0.5, entropy=0.01, adversarial=0.5, adaptive_adversarial=True)
PERCEPTUAL = replace(LOSSES, perceptual=0.1)
FROZEN = {
    "pixel": (),
    "joint": (),
    "joint, tower frozen": ("semantic_encoder.tower.",),
    "joint, no semantic loss": ("semantic_decoder.",),
    "decoder": ("semantic_encoder.", "semantic_decoder.", "pixel_encoder.", "quantizer."),
}


class Watch(L.Callback):
    """Copies every tensor before the first step, and may interfere with the module's modes."""

    def __init__(self, interferes: bool = False):
        self.interferes = interferes

    def on_train_start(self, trainer, pl_module):
        self.before = {name: tensor.clone() for name, tensor in _tensors(pl_module).items()}
        self.trained_modes, self.frozen_modes = set(), set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.interferes:
            pl_module.train()

    def on_train_batch_end(self, trainer, pl_module, *args):
        frozen = {id(part) for root in pl_module.frozen_parts() for part in root.modules()}
        for part in pl_module.tokenizer.modules():
            if part is not pl_module.tokenizer:
                (self.frozen_modes if id(part) in frozen else self.trained_modes).add(part.training)


def _tensors(module: TokenizerModule) -> dict[str, torch.Tensor]:
    tensors = dict(module.tokenizer.named_parameters()) | dict(module.tokenizer.named_buffers())
    for name in ("teacher", "perceptual"):
        network = getattr(module.objective, name)
        if network is not None:
            tensors |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def module_of(tiny_tokenizer, siglip2, vgg_file, tmp_path_factory):
    """Builds the module of a case of FROZEN; stage decoder starts from a joint checkpoint that is made here."""
    common = {
        "semantic_encoder": siglip2,
        "losses": LOSSES,
        "perceptual_weights": vgg_file,
        "discriminator": DiscriminatorConfig(width=8, num_layers=1, groups=4),
        "discriminator_start": 1,
    }
    options = {
        "pixel": {"stage": "pixel"},
        "joint": {"stage": "joint", "losses": PERCEPTUAL},
        "joint, tower frozen": {"stage": "joint", "semantic_encoder_trainable": False},
        "joint, no semantic loss": {"stage": "joint", "losses": replace(LOSSES, semantic=0.0)},
        "decoder": {"stage": "decoder", "losses": PERCEPTUAL},
    }

    def build(case: str, **more) -> TokenizerModule:
        config, start = tiny_tokenizer, {}
        if case == "decoder":
            config, start = replace(config, decoder_capacity=2), {"init_from": str(_joint_checkpoint())}
        return TokenizerModule(config, **{**common, **options[case], **start, **more})

    def _joint_checkpoint():
        path = tmp_path_factory.getbasetemp() / "joint_for_decoder.ckpt"
        if not path.exists():
            module = TokenizerModule(tiny_tokenizer, semantic_encoder=siglip2)
            module.tokenizer.quantizer.health.pixel_ready.fill_(True)
            module.tokenizer.quantizer.health.semantic_ready.fill_(True)
            torch.save({"tokenizer_config": module.tokenizer.config.to_dict(), "state_dict": module.state_dict()}, path)
        return path

    return build


@pytest.mark.parametrize("interferes", [False, True])
@pytest.mark.parametrize("case", FROZEN)
def test_frozen_parts_are_bitwise_unchanged_and_all_others_train(case, interferes, module_of, fit):
    module, watch = module_of(case), Watch(interferes)
    dropout = ScaleDropout(share=0.5, probability=1.0)
    trainer = fit(module, callbacks=[watch, dropout], val_check_interval=2)
    changed = {name for name, after in _tensors(module).items() if not torch.equal(after, watch.before[name])}

    frozen = (*FROZEN[case], "teacher.", "perceptual.")
    assert not {name for name in changed if name.startswith(frozen)}
    assert any(name.startswith("perceptual.") for name in watch.before) == (module.losses.perceptual > 0)
    assert any(name.startswith("teacher.") for name in watch.before) == (case == "joint")
    parameters = dict(module.tokenizer.named_parameters())
    trained = {name for name in parameters if not name.startswith(frozen)}
    parts = {name.split(".")[0] for name in trained}
    assert {name.split(".")[0] for name in changed & trained} == parts
    if case != "decoder":
        assert "quantizer.health.usage_K" in changed

    assert watch.trained_modes == {True}
    assert watch.frozen_modes == ({False} if FROZEN[case] else set())
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == {
        name for name in trained if name != "quantizer.semantic_codebook" or module.tokenizer.code_dim > 4
    }
    assert all(parameters[name].grad is None for name in parameters if name.startswith(frozen))
    generator, discriminator = trainer.optimizers
    learning = {id(parameter) for parameter in module.tokenizer.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in generator.param_groups for parameter in group["params"]} == learning
    assert {id(parameter) for parameter in generator.state} <= learning
    assert {id(parameter) for parameter in discriminator.state} == {id(p) for p in module.discriminator.parameters()}


def test_pixel_stage_has_no_semantic_branch(module_of):
    module = module_of("pixel")
    names = {name.split(".")[0] for name in module.tokenizer.state_dict()}
    assert names == {"pixel_encoder", "pixel_decoder", "quantizer"}
    assert module.tokenizer.quantizer.semantic_codebook.numel() == 0


def test_a_frozen_tower_holds_the_folders_weights_and_its_projection_learns(module_of, fit):
    module, watch = module_of("joint, tower frozen"), Watch()
    fit(module, callbacks=[watch])
    before, after = watch.before, _tensors(module)
    assert not torch.equal(after["semantic_encoder.project.0.weight"], before["semantic_encoder.project.0.weight"])
    trained = module_of("joint")
    fit(trained)
    for name, value in trained.objective.teacher.state_dict().items():  # the teacher is what the folder holds
        assert torch.equal(after[f"semantic_encoder.tower.{name}"], value), name


def test_checkpoints_hold_no_frozen_network_from_a_file(module_of, fit, tmp_path):
    straight, first, second = (module_of("joint", losses=LOSSES, total_steps=6) for _ in range(3))
    for module in (first, second):
        module.load_state_dict(straight.state_dict())
    fit(straight, max_steps=6)
    fit(first, max_steps=4).save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in stored} == {"tokenizer", "discriminator"}
    fit(second, max_steps=6, ckpt_path=tmp_path / "half.ckpt")
    for name, value in _tensors(straight).items():
        assert torch.equal(_tensors(second)[name], value), name
