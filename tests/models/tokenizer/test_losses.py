"""Terms and weights of the objective; a term of weight 0 is neither built nor computed; LPIPS reads a local file alone."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.vgg import cfgs, make_layers

from nextflow.models.tokenizer import losses
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.losses import LossWeights, Objective, PerceptualLoss
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.semantic import SemanticTower
from nextflow.sequence.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={32: 3}, stride=8)
GRIDS = SCHEDULE.grids(32)
CONFIG = TokenizerConfig(
    schedule=SCHEDULE,
    codebook_size=16,
    semantic_dim=4,
    pixel_dim=2,
    pixel=PixelConfig(layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=8, groups=4),
    semantic=SemanticConfig(
        width=16,
        mlp_width=16,
        num_layers=2,
        num_heads=2,
        num_patches=4,
        decoder_layers=1,
        decoder_width=8,
        decoder_heads=2,
    ),
)
NOTHING = LossWeights(**{field.name: 0 for field in fields(LossWeights)})
COMPUTED_BY = {
    "mse": (F, "mse_loss"),
    "l1": (F, "l1_loss"),
    "semantic": (losses, "semantic_loss"),
}


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights in the format of torchvision's file (which also holds a classifier)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**make_layers(cfgs["D"]).state_dict(prefix="features."), "classifier.0.weight": torch.zeros(1)}, path)
    return path


def _output(**options):
    torch.manual_seed(0)
    tokenizer, images = Tokenizer(CONFIG), torch.rand(2, 3, 32, 32) * 2 - 1
    return tokenizer, images, tokenizer(images, GRIDS, **options)


def test_total_is_the_weighted_sum_of_the_terms(vgg_file):
    _, images, output = _output(entropy=True)
    teacher = SemanticTower(CONFIG.semantic, SCHEDULE.stride)
    weights = LossWeights(mse=1, l1=2, perceptual=3, semantic=4, quantizer=5, residual=6, entropy=7)
    objective = Objective(weights, PerceptualLoss(vgg_file), teacher)
    terms = objective.terms(images, output)
    expected = {
        "mse": 1 * (output.images_BCHW - images).square().mean(),
        "l1": 2 * (output.images_BCHW - images).abs().mean(),
        "perceptual": 3 * objective.perceptual(output.images_BCHW, images),
        "semantic": 4 * (1 - F.cosine_similarity(output.semantic_BND, teacher(images), dim=-1)).mean(),
        "codebook": 5 * output.quantizer.codebook_loss,
        "commitment": 5 * output.quantizer.commitment_loss,
        "residual": 6 * output.quantizer.residual_loss,
        "entropy": 7 * output.quantizer.entropy_loss,
    }
    assert set(terms) == set(expected)
    torch.testing.assert_close(objective.total(terms), sum(expected.values()))
    pixels = expected["mse"] + expected["l1"] + expected["perceptual"]
    torch.testing.assert_close(objective.total(terms, pixels_only=True), pixels)


def test_a_frozen_tower_is_its_own_teacher():
    tokenizer, images, output = _output()
    copy = SemanticTower(CONFIG.semantic, SCHEDULE.stride)
    copy.load_state_dict(tokenizer.semantic_encoder.tower.state_dict())
    own, other = Objective(LossWeights()), Objective(LossWeights(), teacher=copy)
    term = own.terms(images, output)["semantic"]
    torch.testing.assert_close(term, other.terms(images, output)["semantic"])
    gradients = torch.autograd.grad(term, output.tower_BND, retain_graph=True)  # through the codes alone
    torch.testing.assert_close(
        gradients, torch.autograd.grad(other.terms(images, output)["semantic"], output.tower_BND)
    )


@pytest.mark.parametrize("name", [field.name for field in fields(LossWeights) if field.name != "adaptive_adversarial"])
def test_a_term_of_weight_0_is_not_computed(name, monkeypatch):
    _, images, output = _output(decode_semantic=name != "semantic")
    if name in COMPUTED_BY:
        monkeypatch.setattr(*COMPUTED_BY[name], lambda *_, **__: pytest.fail(f"{name} was computed"))
    weights = replace(LossWeights(), **{name: 0.0})
    terms = Objective(weights).terms(images, output)
    assert not {name, *({"codebook", "commitment"} if name == "quantizer" else ())} & set(terms)
    left = {field.name for field in fields(LossWeights) if getattr(weights, field.name)}
    assert left == {losses._WEIGHT_OF.get(term, term) for term in terms}


def test_the_semantic_decoder_and_the_entropy_run_only_when_asked(monkeypatch):
    tokenizer, images, _ = _output()
    calls = []
    tokenizer.semantic_decoder.register_forward_hook(lambda *_: calls.append("semantic"))
    assert tokenizer(images, GRIDS, decode_semantic=False).semantic_BND is None and not calls
    assert tokenizer(images, GRIDS).quantizer.entropy_loss is None and calls == ["semantic"]


@pytest.mark.parametrize("stage, kept", [("pixel", {"mse", "quantizer"}), ("decoder", {"mse"})])
def test_stages_leave_out_what_they_cannot_learn_from(stage, kept):
    weights = replace(NOTHING, mse=1.0, semantic=1.0, quantizer=0.5 if stage == "pixel" else 1.0).for_stage(stage)
    assert {field.name for field in fields(weights) if getattr(weights, field.name)} == kept
    with pytest.raises(ValueError, match=rf"stage {stage} has nothing to learn from.*losses.l1"):
        replace(NOTHING, semantic=1.0, adversarial=1.0).for_stage(stage)


def test_weights_are_checked_by_name():
    with pytest.raises(ValueError, match=r"losses.l1 must not be negative"):
        LossWeights(l1=-1.0)
    with pytest.raises(ValueError, match=r"losses.adaptive_adversarial.*losses.mse"):
        LossWeights(mse=0.0, adversarial=1.0, adaptive_adversarial=True)


def test_perceptual_loss_is_torchmetrics_with_the_files_backbone(vgg_file):
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(1)
    ours, a, b = PerceptualLoss(vgg_file), torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    features = {key.removeprefix("features."): value for key, value in torch.load(vgg_file).items()}
    for part in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5):
        part.load_state_dict({key: features[key] for key in part.state_dict()})
    torch.testing.assert_close(ours(a, b), theirs(a, b).mean())
    assert ours(a, a) == 0
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


def test_files_that_are_no_backbone_are_named(tmp_path):
    path = tmp_path / "file.pth"
    with pytest.raises(FileNotFoundError, match=r"perceptual_weights: .*file.pth.*vgg16-397923af.pth"):
        PerceptualLoss(path)
    path.write_text("text")
    with pytest.raises(ValueError, match=r"perceptual_weights: .*file.pth is not a file of weights"):
        PerceptualLoss(path)
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"perceptual_weights: .*VGG16"):
        PerceptualLoss(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"perceptual_weights: .*VGG16"):
        PerceptualLoss(path)
