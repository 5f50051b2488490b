"""The objective in training: every term is logged, a weight of 0 builds and runs nothing, and trainer options that do not fit
are refused by the name of what to set instead."""

from dataclasses import fields, replace

import pytest

from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig
from nextflow.models.tokenizer.losses import LossWeights

ALL = LossWeights(
    mse=1.0, l1=0.5, perceptual=0.25, semantic=0.75, quantizer=1.5, residual=0.3, entropy=0.02, adversarial=0.4
)
SMALL = DiscriminatorConfig(width=8, num_layers=1, groups=4)
WEIGHT_OF = {"codebook": "quantizer", "commitment": "quantizer"}


@pytest.fixture
def module_of(tiny_tokenizer, siglip2, vgg_file):
    def build(losses: LossWeights, **options) -> TokenizerModule:
        return TokenizerModule(
            tiny_tokenizer,
            **{"semantic_encoder": siglip2, "perceptual_weights": vgg_file, "discriminator": SMALL, **options},
            losses=losses,
        )

    return build


@pytest.mark.parametrize("adaptive", [False, True])
def test_every_term_is_logged_and_the_loss_is_their_weighted_sum(adaptive, module_of, fit):
    trainer = fit(module_of(replace(ALL, adaptive_adversarial=adaptive)), max_steps=2, limit_val_batches=0)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    terms = {
        name.removeprefix("train/loss_"): value for name, value in logged.items() if name.startswith("train/loss_")
    }
    names = {field.name for field in fields(LossWeights)} - {"adaptive_adversarial", "quantizer"}
    assert set(terms) == names | {"codebook", "commitment", "discriminator"}
    weight = {name: getattr(ALL, WEIGHT_OF.get(name, name)) for name in terms if name != "discriminator"}
    assert ("train/adversarial_weight" in logged) == adaptive
    if adaptive:
        assert logged["train/adversarial_weight"] > 0
        weight["adversarial"] = logged["train/adversarial_weight"]
    assert logged["train/loss"] == pytest.approx(sum(weight[name] * terms[name] for name in weight), rel=1e-4)


def test_weights_of_0_build_and_run_nothing(module_of, fit):
    module = module_of(LossWeights(semantic=0.0, residual=0.0), semantic_encoder=None, perceptual_weights=None)
    module.tokenizer.semantic_decoder.register_forward_hook(lambda *_: pytest.fail("the semantic decoder ran"))
    trainer = fit(module, max_steps=2, limit_val_batches=0)
    assert module.objective.teacher is None and module.objective.perceptual is None and module.discriminator is None
    logged = {name for name in trainer.callback_metrics if name.startswith("train/")}
    assert logged == {"train/loss", "train/loss_mse", "train/loss_codebook", "train/loss_commitment"}
    assert not any(parameter.requires_grad for parameter in module.tokenizer.semantic_decoder.parameters())


def test_nothing_adversarial_runs_before_its_start(module_of, fit):
    module = module_of(replace(ALL, perceptual=0.0, adaptive_adversarial=True), discriminator_start=2)
    module.discriminator.register_forward_hook(lambda *_: pytest.fail("the discriminator ran"))
    trainer = fit(module, max_steps=2, limit_val_batches=0)
    assert not {"train/loss_adversarial", "train/loss_discriminator"} & set(trainer.callback_metrics)


def test_accumulated_batches_make_one_step(module_of, fit):
    module = module_of(LossWeights(), warmup_steps=2, total_steps=4)
    trainer = fit(module, accumulate_grad_batches=2, max_steps=-1, max_epochs=1, limit_val_batches=0)
    assert trainer.global_step == 2  # of four batches
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)  # the second step's


@pytest.mark.parametrize("adversarial", [0.0, 0.4])
def test_options_of_the_trainer_that_do_not_fit_are_refused_by_name(adversarial, module_of, fit):
    losses = LossWeights(adversarial=adversarial)
    with pytest.raises(ValueError, match=r"trainer.gradient_clip_val.*model.gradient_clip"):
        fit(module_of(losses), gradient_clip_val=1.0)
    if adversarial:
        with pytest.raises(ValueError, match=r"trainer.accumulate_grad_batches.*losses.adversarial.*data.batch_size"):
            fit(module_of(losses), accumulate_grad_batches=2)


def test_weights_need_their_files_by_name(module_of, fit):
    with pytest.raises(ValueError, match=r"losses.perceptual.*perceptual_weights"):
        module_of(ALL, perceptual_weights=None)
    with pytest.raises(FileNotFoundError, match=r"perceptual_weights.*nothing.pth"):
        fit(module_of(ALL, perceptual_weights="nothing.pth"))
    with pytest.raises(ValueError, match="semantic_encoder"):
        module_of(ALL, semantic_encoder=None)
    with pytest.raises(FileNotFoundError, match=r"semantic_encoder.*nowhere"):
        fit(module_of(LossWeights(), semantic_encoder="nowhere"))
