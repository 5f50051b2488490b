"""Adaptive weight of the adversarial loss (VQGAN, arXiv 2012.09841, eq. 7).

    weight = clamp(|d reconstruction / d w| / (|d adversarial / d w| + 1e-4), 0, 1e4),   w = weight of the last convolution

The gradients come from the convolution's input and from the gradients with respect to the pictures, instead of from w
itself: under FSDP2 the parameter that autograd sees is not the one that the module holds. They are averaged over all
ranks before their norms are taken, so any number of ranks has the weight of one rank with the whole batch.

B images, C channels, H x W pixels, h x w cells where the last convolution runs, O its output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from nextflow.models.tokenizer.pixel import PixelDecoder
from nextflow.models.tokenizer.ranks import num_ranks, sum_over_ranks


class AdaptiveWeight:
    """Watches one forward pass of a pixel decoder: `with AdaptiveWeight(decoder) as weight: ...`, then call it once."""

    def __init__(self, decoder: PixelDecoder) -> None:
        self._conv = decoder.to_pixels
        self._stem = decoder.shuffle.upscale_factor
        self._input_BChw: Tensor | None = None

    def __enter__(self) -> AdaptiveWeight:
        self._hook = self._conv.register_forward_pre_hook(self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def __call__(self, reconstruction_loss: Tensor, adversarial_loss: Tensor, images_BCHW: Tensor) -> Tensor:
        """The weight, a number without gradient.

        Args:
            reconstruction_loss: weighted sum of the terms that compare pictures.
            adversarial_loss: the generator's hinge loss, unweighted.
            images_BCHW: what the decoder returned in the watched pass and both losses were computed from.
        """
        weight_grads = torch.stack(
            [self._weight_grad(loss, images_BCHW) for loss in (reconstruction_loss, adversarial_loss)]
        )
        reconstruction, adversarial = (sum_over_ranks(weight_grads) / num_ranks()).flatten(1).norm(dim=1)
        return (reconstruction / (adversarial + 1e-4)).clamp(0.0, 1e4)

    def _weight_grad(self, loss: Tensor, images_BCHW: Tensor) -> Tensor:
        assert self._input_BChw is not None, "the decoder did not run inside the `with` block"
        (grad_BCHW,) = torch.autograd.grad(loss, images_BCHW, retain_graph=True)
        grad_BOhw = F.pixel_unshuffle(grad_BCHW.float(), self._stem)
        return conv2d_weight(self._input_BChw.float(), self._conv.weight.shape, grad_BOhw, padding=self._conv.padding)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._input_BChw = inputs[0].detach()
