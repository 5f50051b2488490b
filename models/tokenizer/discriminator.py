"""PatchGAN discriminator (pix2pix, as in VQGAN), with GroupNorm in place of BatchNorm: no running statistics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Size of the patch discriminator."""

    width: int = 64
    """Channels of the first layer; they double per layer up to eight times."""
    num_layers: int = 3
    """Layers of stride 2; 3 give logits that each see 70 x 70 pixels."""
    groups: int = 32
    """Groups of each GroupNorm."""


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] -> one logit per patch [B, 1, h, w]."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, config.width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = config.width
        for index in range(1, config.num_layers + 1):
            width_out = config.width * min(2**index, 8)
            stride = 1 if index == config.num_layers else 2
            layers += [
                nn.Conv2d(width, width_out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(config.groups, width_out),
                nn.LeakyReLU(0.2),
            ]
            width = width_out
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # sharded parts of the tokenizer may compute in bfloat16; this network keeps its parameters whole, in float32
        return self.layers(images_BCHW.float())
