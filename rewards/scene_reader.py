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
from torch import Tensor
from torch.nn import functional as F

from nextflow.rewards.templates import Templates, load_drawing

MIN_SHARE = 0.002
"""Finds that explain less than this share of what the largest one does are noise."""

LIKELY_PIXELS = 2**17
"""Of the drawings that are compared at all places near a find: 32 drawings of 64 pixels, but all of 20, which look alike."""
NUM_STARTS, MOST_STARTS = 4, 16
"""Drawings of the small copy from which a find is looked for at full size; the more where none of the first few fits at all."""
COARSE_FIT = 0.2
"""Least fit in the small copy, where thin lines blur."""
GOOD_FIT = 0.95
"""A find that fits so well needs no other start."""
MOST_OVERLAP = 0.15
"""Of the smaller of two finds. Drawings have a margin, so boxes of neighbours may touch."""
MAX_MOVES = 6
"""How often a find moves to a better place near by."""
MAX_KEPT_SIDE = 64
"""Drawings are kept resized up to this side: for 250 drawings at most 16 MB a side, 350 MB if every side comes up."""


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
        self._drawings_D4ss = torch.stack([load_drawing(Path(folder) / f"{hexcode}.png") for hexcode in self.hexcodes])
        self._templates: dict[int, Templates] = {}
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
            found: list[Found] = []
            for starts in coarse:
                find = self._refine(x_B3HW[b], background_3, starts, scale)
                is_part = any(_overlap(find, other) > MOST_OVERLAP for other in found)
                if find.fit >= self.min_fit and not is_part:
                    found.append(find)
            readings.append(SceneReading(tuple(found), tuple(background_3.tolist())))
        return readings

    def _try_side(self, x_B3hw: Tensor, background_B3: Tensor, side: int, templates: Templates) -> _Finds:
        """The best drawing of one size at each place."""
        gain_BPD, energy_BP = self._gains(x_B3hw, background_B3, side, templates)
        best = gain_BPD.max(dim=2)
        return _Finds(side, best.values.numpy(), best.indices.numpy(), energy_BP.numpy())

    def _gains(self, x_B3hw: Tensor, background_B3: Tensor, side: int, templates: Templates) -> tuple[Tensor, Tensor]:
        """Gain [B, P, D] of each drawing at each place, and |Q|^2 [B, P] there."""
        q_B3hw = x_B3hw - background_B3[:, :, None, None]
        # <Q, alpha (D - b)> = <Q, alpha D> - <b Q, alpha>: the background is one channel more, not one set of templates more.
        shade_B1hw = (background_B3[:, :, None, None] * q_B3hw).sum(dim=1, keepdim=True)
        cells_BPX = _patches(torch.cat([q_B3hw, -shade_B1hw], dim=1), side)
        inner_BPD = cells_BPX @ templates.weight_DX.T
        norm_BD = templates.norm_of(background_B3)
        gain_BPD = 2 * inner_BPD - norm_BD[:, None, :]
        energy_BP = F.avg_pool2d(q_B3hw.square().sum(dim=1, keepdim=True), side, stride=1).flatten(1) * side * side
        return gain_BPD, energy_BP

    def _likely(self, x_3hw: Tensor, background_3: Tensor, box: _Box) -> Tensor | None:
        """The drawings that explain a box best; None for all, which need no choice."""
        number = max(1, LIKELY_PIXELS // box.side**2)
        if number >= len(self.hexcodes):
            return None
        patch_13ss = x_3hw[None, :, box.top : box.top + box.side, box.left : box.left + box.side]
        side = min(box.side, MAX_KEPT_SIDE)
        if side < box.side:
            patch_13ss = F.interpolate(patch_13ss, size=(side, side), mode="bilinear", antialias=True)
        gain_11D, _ = self._gains(patch_13ss, background_3[None], side, self._templates_of(side))
        return gain_11D.flatten().topk(number).indices

    def _choose(self, finds: list[_Finds], size: tuple[int, int]) -> list[list[_Box]]:
        """Where drawings stand, best first; for each the best boxes there of a few drawings, best first."""
        _, width = size
        gain = np.concatenate([find.gain for find in finds])
        fit = gain / np.maximum(np.concatenate([find.energy for find in finds]), 1e-6)
        # Between a drawing and a larger one that explains more but badly, such as a bed in place of two squares.
        worth = gain * fit**2
        drawing = np.concatenate([find.drawing for find in finds])
        side = np.concatenate([np.full(len(find.gain), find.side) for find in finds])
        place = np.concatenate([np.arange(len(find.gain)) for find in finds])
        top, left = np.divmod(place, width - side + 1)
        bottom, right = top + side, left + side
        free = (fit >= COARSE_FIT) & (gain > 0)
        boxes: list[list[_Box]] = []
        largest = 0.0
        while free.any() and len(boxes) < self.max_found:
            best = int(np.where(free, worth, -np.inf).argmax())
            if gain[best] < MIN_SHARE * largest:
                break
            largest = max(largest, gain[best])
            across = np.minimum(right, right[best]) - np.maximum(left, left[best])
            down = np.minimum(bottom, bottom[best]) - np.maximum(top, top[best])
            overlap = np.maximum(across, 0) * np.maximum(down, 0)
            apart = overlap <= MOST_OVERLAP * np.minimum(side, side[best]) ** 2
            here = np.flatnonzero(free & ~apart)
            here = here[np.argsort(-worth[here], kind="stable")]
            starts = here[np.sort(np.unique(drawing[here], return_index=True)[1])[:MOST_STARTS]]
            boxes.append([_Box(int(left[one]), int(top[one]), int(side[one])) for one in starts])
            free &= apart
        return boxes

    def _refine(self, x_3HW: Tensor, background_3: Tensor, starts: list[_Box], scale: tuple[float, float]) -> Found:
        """The best drawing near boxes of the small copy, at full size; later ones are tried where the first fit badly."""
        height, width = x_3HW.shape[1:]
        found: list[_Candidate] = []
        seen: dict[_Box, _Candidate] = {}
        for start in starts:
            if len(found) >= NUM_STARTS and max(found).fit >= self.min_fit:
                break
            side = min(max(4, round(start.side * sum(scale) / 2)), height, width)
            top, left = min(round(start.top * scale[0]), height - side), min(round(start.left * scale[1]), width - side)
            found.append(self._climb(x_3HW, background_3, _Box(left, top, side), max(1, round(max(scale))), seen))
            if found[-1].fit >= GOOD_FIT:
                break
        best = max(found)
        left, top, side = best.box
        inside = (left / width, top / height, (left + side) / width, (top + side) / height)
        return Found(self.hexcodes[best.drawing], inside, best.fit)

    def _climb(
        self, x_3HW: Tensor, background_3: Tensor, start: _Box, reach: int, seen: dict[_Box, _Candidate]
    ) -> _Candidate:
        """The best near by, then the best near that one, until it stays; `seen` remembers it for starts that meet."""
        best = _Candidate(float("-inf"), start, 0, 0.0)
        for _ in range(MAX_MOVES + 1):
            if best.box not in seen:
                seen[best.box] = self._nearby(x_3HW, background_3, best.box, reach)
            if seen[best.box].gain <= best.gain:
                break
            best = seen[best.box]
        return best

    def _nearby(self, x_3HW: Tensor, background_3: Tensor, box: _Box, reach: int) -> _Candidate:
        """The best of the drawings that are likely in a box, within `reach` of its sides."""
        height, width = x_3HW.shape[1:]
        likely = self._likely(x_3HW, background_3, box)
        candidates = []
        for side in range(max(4, box.side - reach), min(box.side + reach, height, width) + 1):
            top = min(max(0, box.top - reach), height - side)
            left = min(max(0, box.left - reach), width - side)
            window_13hw = x_3HW[None, :, top : top + side + 2 * reach, left : left + side + 2 * reach]
            found = self._try_side(window_13hw, background_3[None], side, self._templates_of(side, likely)).of(0)
            place = int(found.gain.argmax())
            row, column = divmod(place, window_13hw.shape[3] - side + 1)
            gain = float(found.gain[place])
            fit = gain / max(float(found.energy[place]), 1e-6)
            drawing = int(found.drawing[place] if likely is None else likely[found.drawing[place]])
            candidates.append(_Candidate(gain, _Box(left + column, top + row, side), drawing, fit))
        return max(candidates)

    def _templates_of(self, side: int, drawings: Tensor | None = None) -> Templates:
        """All drawings, or some, in one size. Resizing is slow, so all are kept in the sizes of small pictures."""
        if drawings is not None and side > MAX_KEPT_SIDE:
            return Templates.of(self._drawings_D4ss[drawings], side)
        if side not in self._templates:
            self._templates[side] = Templates.of(self._drawings_D4ss, side)
        kept = self._templates[side]
        return kept if drawings is None else kept.only(drawings)


@lru_cache(maxsize=4)
def scene_reader(folder: str, side: int = 32) -> SceneReader:
    """The reader of a folder; one per folder, however many rewards use it."""
    return SceneReader(folder, side)


class _Box(NamedTuple):
    """A square of a picture or of its small copy, in pixels."""

    left: int
    top: int
    side: int


class _Candidate(NamedTuple):
    """A drawing in a box of the picture."""

    gain: float
    box: _Box
    drawing: int
    fit: float


class _Finds(NamedTuple):
    side: int
    gain: Any
    drawing: Any
    energy: Any

    def of(self, index: int) -> _Finds:
        return _Finds(self.side, self.gain[index], self.drawing[index], self.energy[index])


def _patches(x_BChw: Tensor, side: int) -> Tensor:
    """All squares of a side, [B, P, C * side * side]: as `F.unfold`, transposed, but copied row by row: five times faster."""
    x_BCyxss = x_BChw.unfold(2, side, 1).unfold(3, side, 1)
    return x_BCyxss.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _overlap(first: Found, second: Found) -> float:
    """Of two boxes, as a share of the smaller."""
    (left, top, right, bottom), (left2, top2, right2, bottom2) = first.box, second.box
    across, down = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
    smaller = min((right - left) * (bottom - top), (right2 - left2) * (bottom2 - top2))
    return max(across, 0.0) * max(down, 0.0) / smaller


def _sides(largest: int) -> list[int]:
    """Sides to try, from a sixth of the picture's short side up to all of it, about 10 % apart."""
    sides = {largest}
    side = float(largest)
    while side > max(4.0, largest / 6):
        sides.add(round(side))
        side /= 1.1
    return sorted(sides)
