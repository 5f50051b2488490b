"""Losses of tokenizer training (NextFlow section 3.1; terms and weights of TokenFlow where the paper is silent).

    total = mse + l1 + perceptual (LPIPS) + semantic (1 - cosine to the teacher) + quantizer + residual + adversarial (hinge)

Each term is multiplied by its weight; a term of weight 0 is neither built nor computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """Codebook loss plus commitment loss (which already holds beta)."""
    residual: float = 0.25
    """Squared distance of the features to the quantised sum, which keeps their length within reach of unit entries."""
    adversarial: float = 0.0
    """Hinge loss against the patch discriminator, from `discriminator_start` on."""


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
    """LPIPS with the VGG16 backbone of a local file; never downloads.

    Args:
        weights: torchvision's VGG16 weights (`vgg16-397923af.pth`); the linear heads ship with torchmetrics.

    Raises FileNotFoundError or ValueError, naming the key `perceptual_weights`, for a missing file or one that does not
    fit.
    """

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        if weights is None or not Path(weights).is_file():
            raise FileNotFoundError(
                f"perceptual_weights: {weights} is not a file; "
                "give torchvision's vgg16-397923af.pth, or set losses.perceptual to 0"
            )
        from torchmetrics.functional.image.lpips import _LPIPS

        # pnet_rand: the backbone is built without a download and filled from the file below
        self.lpips = _LPIPS(pretrained=True, net="vgg", pnet_rand=True)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        features = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
        expected = {key.split(".", 1)[1]: key for key in self.lpips.net.state_dict()}  # slice2.5.weight <- 5.weight
        if set(expected) != set(features):
            raise ValueError(f"perceptual_weights: {weights} does not hold the convolutions of torchvision's VGG16")
        self.lpips.net.load_state_dict({expected[key]: value for key, value in features.items()})
        self.requires_grad_(False)

    def forward(self, reconstruction_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """Mean LPIPS distance of images in [-1, 1]."""
        return self.lpips(reconstruction_BCHW.float(), images_BCHW.float()).mean()
