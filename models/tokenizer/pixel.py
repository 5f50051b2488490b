"""The pixel branch: a convolutional encoder to `pixel_dim` channels per cell, and the decoder back to pixels.

One skeleton, two layouts that differ in how they change resolution: `vqgan` (strided convolutions, nearest up-sampling;
VQGAN's network, as in TokenFlow) and `patchified` (pixel-unshuffle and pixel-shuffle around 1x1 convolutions). With a
`stem` above 1 no convolution runs at full resolution, which is what a CPU needs. Fully convolutional: any grid.

B images, C channels, H x W pixels or cells.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nextflow.models.tokenizer.config import PixelConfig


class PixelEncoder(nn.Module):
    """Images [B, 3, H, W] -> features [B, pixel_dim, H / stride, W / stride]."""

    def __init__(self, config: PixelConfig, pixel_dim: int) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in config.multipliers]
        down = StridedDown if config.layout == "vqgan" else UnshuffleDown
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(config.stem), nn.Conv2d(3 * config.stem**2, widths[0], 3, padding=1)
        )
        self.stages = nn.ModuleList()
        for index, width in enumerate(widths):
            stage: list[nn.Module] = [] if index == 0 else [down(widths[index - 1], width)]
            stage += [ResidualBlock(width, config.groups) for _ in range(config.num_blocks)]
            self.stages.append(nn.Sequential(*stage))
        self.middle = middle(widths[-1], config)
        self.norm = nn.GroupNorm(config.groups, widths[-1])
        self.to_latent = nn.Conv2d(widths[-1], config.latent_width, 3, padding=1)
        self.to_code = nn.Conv2d(config.latent_width, pixel_dim, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stem(images_BCHW)
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        x_BCHW = self.to_latent(F.silu(self.norm(self.middle(x_BCHW))))
        return self.to_code(x_BCHW)


class PixelDecoder(nn.Module):
    """Quantised features [B, pixel_dim, h, w] -> images [B, 3, h * stride, w * stride] in about [-1, 1].

    `capacity` 2 doubles channels and residual blocks (NextFlow's third stage); `growth.grow_decoder` carries weights
    over.
    """

    def __init__(self, config: PixelConfig, pixel_dim: int, capacity: int = 1) -> None:
        super().__init__()
        widths = [config.width * multiplier * capacity for multiplier in config.multipliers]
        up = NearestUp if config.layout == "vqgan" else ShuffleUp
        self.from_code = nn.Conv2d(pixel_dim, config.latent_width * capacity, 1)
        self.from_latent = nn.Conv2d(config.latent_width * capacity, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], config)
        self.stages = nn.ModuleList()
        for index in reversed(range(len(widths))):
            blocks = [ResidualBlock(widths[index], config.groups) for _ in range(config.num_blocks * capacity)]
            change = up(widths[index], widths[index - 1]) if index else nn.Identity()
            self.stages.append(DecoderStage(nn.Sequential(*blocks), change))
        self.norm = nn.GroupNorm(config.groups, widths[0])
        self.to_pixels = nn.Conv2d(widths[0], 3 * config.stem**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(config.stem)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        x_BCHW = self.middle(self.from_latent(self.from_code(features_BCHW)))
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        return self.shuffle(self.to_pixels(F.silu(self.norm(x_BCHW))))


class DecoderStage(nn.Module):
    """The residual blocks of one resolution, then the step to the next higher one."""

    def __init__(self, blocks: nn.Sequential, up: nn.Module) -> None:
        super().__init__()
        self.blocks, self.up = blocks, up

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.up(self.blocks(x_BCHW))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the width unchanged."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return x_BCHW + self.conv2(F.silu(self.norm2(h_BCHW)))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all cells, with a residual connection."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.query = nn.Conv2d(width, width, 1)
        self.key = nn.Conv2d(width, width, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        query, key, value = (part(h_BCHW).flatten(2).mT[:, None] for part in (self.query, self.key, self.value))
        mixed_BCN = F.scaled_dot_product_attention(query, key, value)[:, 0].mT
        return x_BCHW + self.out(mixed_BCN.reshape(x_BCHW.shape))


class StridedDown(nn.Module):
    """3x3 convolution of stride 2, padded right and below (VQGAN)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class NearestUp(nn.Module):
    """Nearest up-sampling by 2, then a 3x3 convolution (VQGAN)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))


class UnshuffleDown(nn.Module):
    """Pixel-unshuffle by 2, then a 1x1 convolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in * 4, width_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pixel_unshuffle(x_BCHW, 2))


class ShuffleUp(nn.Module):
    """1x1 convolution, then pixel-shuffle by 2."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out * 4, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x_BCHW), 2)


def middle(width: int, config: PixelConfig) -> nn.Sequential:
    """What stands at the lowest resolution between encoder stages and codes, or codes and decoder stages."""
    if not config.attention:
        return nn.Sequential()
    return nn.Sequential(
        ResidualBlock(width, config.groups), AttentionBlock(width, config.groups), ResidualBlock(width, config.groups)
    )
