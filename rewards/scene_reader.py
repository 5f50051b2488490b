"""Reads a composed scene back: which of the known drawings stand where, by comparing the picture with the drawings themselves.

A drawing D of a certain size, at a certain place, explains the picture P on its background b by

    gain = |Q|^2 - |Q - U|^2 = 2 <Q, U> - |U|^2,   Q = P - b,  U = alpha (D - b)

summed over pixels: positive where the picture is nearer to the drawing than to the empty background, and largest for the
whole drawing and not for something small inside it. All drawings are tried in all sizes at all places of a small copy of the
picture, by one matrix product per size. The best is a find; then the best that does not overlap it; and so on while a find
explains enough of what it covers. Which drawing it is, is decided at full size, nearby.

The drawings are a folder of HEXCODE.png with transparency (`python -m nextflow.datamodules.openmoji.tiles`).

Shapes: B pictures, D drawings, s side of a drawing, X its values, P places, h w pixels of the small copy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MIN_SHARE = 0.01
"""Finds that explain less than this share of what the largest one does are noise."""

MAX_KEPT_SIDE = 64
"""Drawings are kept resized up to this side: for 250 drawings at most 16 MB a side, 350 MB if every side comes up."""

NUM_LIKELY = 32
"""How many drawings of the small copy are compared again at full size."""


class Found(NamedTuple):
    """A drawing that was found in a picture."""

    hexcode: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom as fractions of the picture's width and height."""
    fit: float
    """Share of what stands in the box that the drawing explains: 1 is the drawing itself."""

    @property
    def centre(self) -> tuple[float, float]:
        """x, y as fractions."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class SceneReading(NamedTuple):
    """What a picture shows."""

    found: tuple[Found, ...]
    background: tuple[float, float, float]
    """RGB, 0 to 255: the median of the picture's border."""


class SceneReader:
    """Finds known drawings. Make it with `scene_reader`, so that rewards of one folder share their readings."""

    def __init__(self, folder: str | Path, side: int = 32, min_fit: float = 0.4, max_found: int = 8) -> None:
        """
        Args:
            folder: of the drawings.
            side: pictures are resized to the area of a square of this side before they are read.
            min_fit: a find explains at least this share of what it covers.
            max_found: most finds of a picture.

        Raises:
            FileNotFoundError: no such folder.
        """
        facts = Path(folder) / "tiles.json"
        if not facts.is_file():
            raise FileNotFoundError(
                f"there is no {facts}: make the drawings with `python -m nextflow.datamodules.openmoji.tiles --output {folder}`"
            )
        self.facts: dict[str, dict[str, str]] = json.loads(facts.read_text())
        self.hexcodes = list(self.facts)
        self.side, self.min_fit, self.max_found = side, min_fit, max_found
        self._drawings_D4ss = torch.stack([_load(Path(folder) / f"{hexcode}.png") for hexcode in self.hexcodes])
        self._templates: dict[int, _Templates] = {}
        self._last: tuple[Sequence[Tensor] | None, list[SceneReading]] = (None, [])

    def read(self, images: Sequence[Tensor]) -> list[SceneReading]:
        """What each picture (uint8 [3, H, W]) shows. Asked again about the same list it answers from memory."""
        if self._last[0] is not images:
            self._last = (images, self._read_all(images))
        return self._last[1]

    @torch.no_grad()
    def _read_all(self, images: Sequence[Tensor]) -> list[SceneReading]:
        readings: dict[int, SceneReading] = {}
        groups: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.shape, []).append(index)
        for members in groups.values():
            for start in range(0, len(members), 32):
                chosen = members[start : start + 32]
                readings.update(zip(chosen, self._read_equal(torch.stack([images[index] for index in chosen]))))
        return [readings[index] for index in range(len(images))]

    def _read_equal(self, image_B3HW: Tensor) -> list[SceneReading]:
        x_B3HW = image_B3HW.float()
        border_B3N = torch.cat([x_B3HW[:, :, 0], x_B3HW[:, :, -1], x_B3HW[:, :, :, 0], x_B3HW[:, :, :, -1]], dim=-1)
        background_B3 = border_B3N.median(dim=-1).values
        height, width = image_B3HW.shape[2:]
        shrink = self.side / (height * width) ** 0.5
        size = (round(height * shrink), round(width * shrink))
        x_B3hw = F.interpolate(x_B3HW, size=size, mode="bilinear", antialias=True)
        finds = [self._try_side(x_B3hw, background_B3, side, self._templates_of(side)) for side in _sides(min(size))]
        readings = []
        for b, background_3 in enumerate(background_B3):
            coarse = self._choose([find.of(b) for find in finds], size)
            scale = (height / size[0], width / size[1])
            found = tuple(
                self._refine(x_B3HW[b], background_3, box, scale, self._likely(x_B3hw[b], background_3, box))
                for box in coarse
            )
            readings.append(SceneReading(found, tuple(background_3.tolist())))
        return readings

    def _try_side(self, x_B3hw: Tensor, background_B3: Tensor, side: int, templates: _Templates) -> _Finds:
        """The best drawing of one size at each place."""
        gain_BPD, energy_BP = self._gains(x_B3hw, background_B3, side, templates)
        best = gain_BPD.max(dim=2)
        return _Finds(side, best.values.numpy(), best.indices.numpy(), energy_BP.numpy())

    def _gains(self, x_B3hw: Tensor, background_B3: Tensor, side: int, templates: _Templates) -> tuple[Tensor, Tensor]:
        """Gain [B, P, D] of each drawing at each place, and |Q|^2 [B, P] there."""
        q_B3hw = x_B3hw - background_B3[:, :, None, None]
        # <Q, alpha (D - b)> = <Q, alpha D> - <b Q, alpha>: the background is one channel more, not one set of templates more.
        shade_B1hw = (background_B3[:, :, None, None] * q_B3hw).sum(dim=1, keepdim=True)
        cells_BPX = F.unfold(torch.cat([q_B3hw, -shade_B1hw], dim=1), side).mT
        inner_BPD = cells_BPX @ templates.weight_DX.T
        norm_BD = templates.norm_of(background_B3)
        gain_BPD = 2 * inner_BPD - norm_BD[:, None, :]
        energy_BP = F.avg_pool2d(q_B3hw.square().sum(dim=1, keepdim=True), side, stride=1).flatten(1) * side * side
        return gain_BPD, energy_BP

    def _likely(self, x_3hw: Tensor, background_3: Tensor, box: _Box) -> Tensor:
        """The drawings that explain a box of the small copy best."""
        patch_13ss = x_3hw[None, :, box.top : box.top + box.side, box.left : box.left + box.side]
        gain_11D, _ = self._gains(patch_13ss, background_3[None], box.side, self._templates_of(box.side))
        return gain_11D.flatten().topk(min(NUM_LIKELY, len(self.hexcodes))).indices

    def _choose(self, finds: list[_Finds], size: tuple[int, int]) -> list[_Box]:
        """Where drawings stand, best first."""
        _, width = size
        gain = np.concatenate([find.gain for find in finds])
        fit = gain / np.maximum(np.concatenate([find.energy for find in finds]), 1e-6)
        # Between a drawing and a larger one that explains more but badly, such as a cow in place of four circles.
        worth = gain * fit
        side = np.concatenate([np.full(len(find.gain), find.side) for find in finds])
        place = np.concatenate([np.arange(len(find.gain)) for find in finds])
        top, left = np.divmod(place, width - side + 1)
        bottom, right = top + side, left + side
        free = (fit >= self.min_fit) & (gain > 0)
        boxes: list[_Box] = []
        largest = 0.0
        while free.any() and len(boxes) < self.max_found:
            best = int(np.where(free, worth, -np.inf).argmax())
            if gain[best] < MIN_SHARE * largest:
                break
            largest = max(largest, gain[best])
            boxes.append(_Box(int(left[best]), int(top[best]), int(side[best])))
            across = np.minimum(right, right[best]) - np.maximum(left, left[best])
            down = np.minimum(bottom, bottom[best]) - np.maximum(top, top[best])
            overlap = np.maximum(across, 0) * np.maximum(down, 0)
            # Drawings have a margin, so boxes of neighbours may touch.
            free &= overlap <= 0.15 * np.minimum(side, side[best]) ** 2
        return boxes

    def _refine(
        self, x_3HW: Tensor, background_3: Tensor, box: _Box, scale: tuple[float, float], likely: Tensor
    ) -> Found:
        """The best of the likely drawings at full size, within a pixel of the small copy."""
        height, width = x_3HW.shape[1:]
        reach = max(1, round(max(scale)))
        middle = round(box.side * sum(scale) / 2)
        best: tuple[float, Found] | None = None
        for side in range(max(4, middle - reach), min(middle + reach, height, width) + 1):
            top = min(max(0, round(box.top * scale[0]) - reach), height - side)
            left = min(max(0, round(box.left * scale[1]) - reach), width - side)
            window_13hw = x_3HW[None, :, top : top + side + 2 * reach, left : left + side + 2 * reach]
            found = self._try_side(window_13hw, background_3[None], side, self._templates_of(side, likely)).of(0)
            place = int(found.gain.argmax())
            row, column = divmod(place, window_13hw.shape[3] - side + 1)
            x, y = (left + column) / width, (top + row) / height
            fit = float(found.gain[place] / max(found.energy[place], 1e-6))
            candidate = Found(
                self.hexcodes[likely[found.drawing[place]]], (x, y, x + side / width, y + side / height), fit
            )
            if best is None or found.gain[place] > best[0]:
                best = float(found.gain[place]), candidate
        assert best is not None
        return best[1]

    def _templates_of(self, side: int, drawings: Tensor | None = None) -> _Templates:
        """All drawings, or some, in one size. Resizing is slow, so all are kept in the sizes of small pictures."""
        if drawings is not None and side > MAX_KEPT_SIDE:
            return _Templates(_resized(self._drawings_D4ss[drawings], side))
        if side not in self._templates:
            self._templates[side] = _Templates(_resized(self._drawings_D4ss, side))
        kept = self._templates[side]
        return kept if drawings is None else _Templates(kept.drawing_D4ss[drawings])


@lru_cache(maxsize=4)
def scene_reader(folder: str, side: int = 32) -> SceneReader:
    """The reader of a folder; one per folder, however many rewards use it."""
    return SceneReader(folder, side)


class _Box(NamedTuple):
    """A square of the small copy, in its pixels."""

    left: int
    top: int
    side: int


class _Finds(NamedTuple):
    side: int
    gain: Any
    drawing: Any
    energy: Any

    def of(self, index: int) -> _Finds:
        return _Finds(self.side, self.gain[index], self.drawing[index], self.energy[index])


class _Templates:
    """Drawings in one size, premultiplied: alpha * D, and alpha."""

    def __init__(self, drawing_D4ss: Tensor) -> None:
        self.drawing_D4ss = drawing_D4ss
        self.weight_DX = drawing_D4ss.flatten(1)
        colour_D3N, alpha_D1N = drawing_D4ss[:, :3].flatten(2), drawing_D4ss[:, 3:].flatten(2)
        self._colour_D = colour_D3N.square().sum(dim=(1, 2))
        self._cross_D3 = (colour_D3N * alpha_D1N).sum(dim=2)
        self._alpha_D = alpha_D1N.square().sum(dim=(1, 2))

    def norm_of(self, background_B3: Tensor) -> Tensor:
        """|alpha (D - b)|^2, [B, D]."""
        squared_B1 = background_B3.square().sum(dim=1, keepdim=True)
        return self._colour_D - 2 * background_B3 @ self._cross_D3.T + squared_B1 * self._alpha_D


def _resized(drawings_D4SS: Tensor, side: int) -> Tensor:
    return F.interpolate(drawings_D4SS, size=(side, side), mode="bilinear", antialias=True)


def _sides(largest: int) -> list[int]:
    """Sides to try, from a sixth of the picture's short side up to all of it, about 10 % apart."""
    sides = {largest}
    side = float(largest)
    while side > max(4.0, largest / 6):
        sides.add(round(side))
        side /= 1.1
    return sorted(sides)


def _load(path: Path) -> Tensor:
    """[4, s, s]: colour times alpha (0 to 255), and alpha (0 to 1)."""
    with Image.open(path) as image:
        rgba_4ss = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float()
    alpha_1ss = rgba_4ss[3:] / 255
    return torch.cat([rgba_4ss[:3] * alpha_1ss, alpha_1ss])
