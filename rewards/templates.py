"""Known drawings as templates, to be compared with pictures (`scene_reader.py`).

Shapes: D drawings, S s sides, X values of a drawing, B backgrounds, N pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


class Templates(NamedTuple):
    """Drawings in one size."""

    weight_DX: Tensor
    """Premultiplied: alpha * D (three channels), and alpha."""
    colour_D: Tensor
    cross_D3: Tensor
    alpha_D: Tensor
    """Sums over pixels that the norm is made of: (alpha D)^2, alpha^2 D, alpha^2."""

    @classmethod
    def of(cls, drawings_D4SS: Tensor, side: int) -> Templates:
        """Drawings of another size, resized."""
        small_D4ss = F.interpolate(drawings_D4SS, size=(side, side), mode="bilinear", antialias=True)
        colour_D3N, alpha_D1N = small_D4ss[:, :3].flatten(2), small_D4ss[:, 3:].flatten(2)
        return cls(
            small_D4ss.flatten(1),
            colour_D3N.square().sum(dim=(1, 2)),
            (colour_D3N * alpha_D1N).sum(dim=2),
            alpha_D1N.square().sum(dim=(1, 2)),
        )

    def only(self, chosen: Tensor) -> Templates:
        """Some of them."""
        return Templates(*(values[chosen] for values in self))

    def norm_of(self, background_B3: Tensor) -> Tensor:
        """|alpha (D - b)|^2, [B, D]."""
        squared_B1 = background_B3.square().sum(dim=1, keepdim=True)
        return self.colour_D - 2 * background_B3 @ self.cross_D3.T + squared_B1 * self.alpha_D


def load_drawing(path: Path) -> Tensor:
    """A PNG file as [4, s, s]: colour times alpha (0 to 255), and alpha (0 to 1)."""
    with Image.open(path) as image:
        rgba_4ss = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float()
    alpha_1ss = rgba_4ss[3:] / 255
    return torch.cat([rgba_4ss[:3] * alpha_1ss, alpha_1ss])
