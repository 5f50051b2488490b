"""Losses of tokenizer training (NextFlow section 3.1; terms and weights of TokenFlow where the paper is silent).

    total = mse + l1 + perceptual (LPIPS) + semantic (1 - cosine to the teacher)
            + quantizer (codebook + commitment) + residual + entropy + adversarial (hinge)

Each term is multiplied by its weight. A term of weight 0 is not computed, and what it alone would need (teacher, LPIPS,
discriminator) is not built; the quantiser's and the residual term are by-products of quantising, which a weight of 0
leaves out of sum and log. `Objective` has all terms but the adversarial ones, which need a second optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextflow.models.tokenizer.semantic import SemanticTower

if TYPE_CHECKING:
    from nextflow.models.tokenizer.model import TokenizerOutput


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each term of the tokenizer's loss. TokenFlow: mse 1, perceptual 1, semantic 1, quantizer 1, adversarial 0.5."""

    mse: float = 1.0
    """Mean squared error of pixels in [-1, 1]."""
    l1: float = 0.0
    """Mean absolute error of pixels in [-1, 1]."""
    perceptual: float = 0.0
    """LPIPS (VGG16); needs `perceptual_weights`."""
    semantic: float = 1.0
    """1 - cosine similarity between decoded and teacher features; without a semantic branch it does not apply."""
    quantizer: float = 1.0
    """Codebook loss plus commitment loss (which already holds `tokenizer.beta`)."""
    residual: float = 0.25
    """Squared distance of the features to the quantised sum, which keeps their length within reach of unit entries."""
    entropy: float = 0.0
    """Entropy of each soft choice of a code minus that of all choices together (`entropy.py`): sure choices, all codes used."""
    adversarial: float = 0.0
    """Hinge loss against the patch discriminator, from `discriminator_start` on."""
    adaptive_adversarial: bool = False
    """Multiply `adversarial` by VQGAN's ratio of gradients (`adaptive_weight.py`). TokenFlow does not."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"losses.{field.name} must not be negative, got {getattr(self, field.name)}")
        if self.adaptive_adversarial and not (self.mse or self.l1 or self.perceptual):
            raise ValueError(
                "losses.adaptive_adversarial compares with losses.mse, l1 or perceptual: one must be above 0"
            )

    def for_stage(self, stage: str) -> LossWeights:
        """The weights that apply in a training stage: `pixel` has no semantics, `decoder` trains on pixels alone.

        Raises ValueError when none is left.
        """
        absent = {"pixel": {"semantic"}, "decoder": {"semantic", "quantizer", "residual", "entropy"}}.get(stage, set())
        none: dict[str, Any] = dict.fromkeys(absent, 0.0)
        weights = replace(self, **none)
        left = sorted(_TERMS - absent)
        if not any(getattr(weights, name) for name in left):
            raise ValueError(
                f"stage {stage} has nothing to learn from: set one of losses.{', losses.'.join(left)} above 0"
            )
        return weights


class Objective:
    """The terms that need no discriminator, with the frozen networks they read.

    It is no `nn.Module` on purpose: teacher and perceptual network come from files whenever training starts, so they
    are neither saved nor sharded nor counted, and no `train()` or optimiser reaches them. `to` moves them.

    Args:
        weights: weight of each term.
        perceptual: LPIPS, required while `weights.perceptual` is above 0.
        teacher: the frozen tower whose features the semantic decoder should reproduce; None takes the features of the
            tokenizer's own tower, which is right while that one is frozen.
    """

    def __init__(
        self, weights: LossWeights, perceptual: PerceptualLoss | None = None, teacher: SemanticTower | None = None
    ) -> None:
        self.weights, self.perceptual = weights, perceptual
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()

    def to(self, device: torch.device) -> None:
        """Move the frozen networks."""
        for network in (self.perceptual, self.teacher):
            if network is not None:
                network.to(device)

    def terms(self, images_BCHW: Tensor, output: TokenizerOutput) -> dict[str, Tensor]:
        """Unweighted terms by name; the quantiser's two parts are apart. Images are in [-1, 1]."""
        weights, reconstruction_BCHW = self.weights, output.images_BCHW.float()
        terms: dict[str, Tensor] = {}
        if weights.mse:
            terms["mse"] = F.mse_loss(reconstruction_BCHW, images_BCHW)
        if weights.l1:
            terms["l1"] = F.l1_loss(reconstruction_BCHW, images_BCHW)
        if weights.perceptual:
            assert self.perceptual is not None
            terms["perceptual"] = self.perceptual(reconstruction_BCHW, images_BCHW)
        if weights.quantizer:
            terms["codebook"] = output.quantizer.codebook_loss
            terms["commitment"] = output.quantizer.commitment_loss
        if weights.residual:
            terms["residual"] = output.quantizer.residual_loss
        if weights.entropy:
            assert output.quantizer.entropy_loss is not None
            terms["entropy"] = output.quantizer.entropy_loss
        if weights.semantic:
            assert output.semantic_BND is not None and output.tower_BND is not None
            teacher_BND = output.tower_BND.detach() if self.teacher is None else self._taught(images_BCHW)
            terms["semantic"] = semantic_loss(output.semantic_BND, teacher_BND)
        return terms

    def total(self, terms: dict[str, Tensor], pixels_only: bool = False) -> Tensor:
        """Weighted sum of terms; `pixels_only` leaves those that compare pictures (what the adaptive weight compares with)."""
        chosen = {name: term for name, term in terms.items() if not pixels_only or name in _PIXEL_TERMS}
        return torch.stack([getattr(self.weights, _WEIGHT_OF.get(name, name)) * chosen[name] for name in chosen]).sum()

    @torch.no_grad()
    def _taught(self, images_BCHW: Tensor) -> Tensor:
        assert self.teacher is not None
        return self.teacher(images_BCHW)


_PIXEL_TERMS = {"mse", "l1", "perceptual"}
_TERMS = _PIXEL_TERMS | {"semantic", "quantizer", "residual", "entropy"}
_WEIGHT_OF = {"codebook": "quantizer", "commitment": "quantizer"}


def semantic_loss(decoded_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """1 - cosine similarity, averaged over cells."""
    return 1.0 - F.cosine_similarity(decoded_BND.float(), teacher_BND.float(), dim=-1).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """The generator's side: raise the discriminator's logits on reconstructions."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's side: logits above 1 on images, below -1 on reconstructions."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


class PerceptualLoss(nn.Module):
    """LPIPS with the VGG16 backbone of a local file; never downloads. Frozen and in evaluation mode.

    Args:
        weights: torchvision's VGG16 weights (`vgg16-397923af.pth`); the linear heads ship with torchmetrics.
        key: the configuration key to name in errors.

    Raises FileNotFoundError or ValueError for a missing file or one that does not fit.
    """

    def __init__(self, weights: str | Path | None, key: str = "perceptual_weights") -> None:
        super().__init__()
        if weights is None or not Path(weights).is_file():
            otherwise = ", or set losses.perceptual to 0" if key == "perceptual_weights" else ""
            raise FileNotFoundError(f"{key}: {weights} is not a file; give torchvision's vgg16-397923af.pth{otherwise}")
        from torchmetrics.functional.image import lpips

        with torch.device("meta"):  # VGG16's 138 million random numbers would take seconds, and none of them is kept
            self.lpips = lpips._LPIPS(pretrained=False, net="vgg", pnet_rand=True)
        backbone = _read_backbone(weights, self.lpips.net.state_dict(prefix="net."), key)
        path = Path(lpips.__file__).parent / "lpips_models" / "vgg.pth"
        heads = torch.load(path, map_location="cpu", weights_only=True)
        # The module holds its heads twice: lin0.model.1.weight is lins.0.model.1.weight as well.
        again = {name.replace("lin", "lins.", 1): head for name, head in heads.items()}
        self.lpips.load_state_dict(backbone | heads | again, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, reconstruction_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """Mean LPIPS distance of images in [-1, 1]."""
        return self.lpips(reconstruction_BCHW.float(), images_BCHW.float()).mean()


def _read_backbone(path: str | Path, ours: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """torchvision's convolutions (`features.5.weight`) under our names (`net.slice2.5.weight`)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken file raises depends on where it breaks
        raise ValueError(f"{key}: {path} is not a file of weights that torch can read ({error})") from error
    theirs = {name: f"features.{name.split('.', 2)[2]}" for name in ours}
    fits = isinstance(state, dict) and all(
        torch.is_tensor(state.get(theirs[name])) and state[theirs[name]].shape == value.shape
        for name, value in ours.items()
    )
    if not fits:
        raise ValueError(f"{key}: {path} does not hold the convolutions of torchvision's VGG16")
    return {name: state[theirs[name]] for name in ours}
