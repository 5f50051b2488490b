"""Scale schedules: which grids of codes an image has, coarse to fine (NextFlow appendix A.1, Table 14).

A schedule is a list of square sides and a list of base grids, one per aspect ratio. Scale k of an image whose base grid is
(H, W) has the grid (round(H * side_k / base_side), round(W * side_k / base_side)), at least one cell each way, where
base_side is the side of the one square base grid. Rounding is half to even, as Python's `round`; the first scale is always 1x1.
This rule reproduces all 41 x 18 grids of the paper's table.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

Grid = tuple[int, int]
"""Height and width of a map of codes, in cells."""

_WIDE_BASE_GRIDS: tuple[Grid, ...] = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 26), (9, 27), (10, 25), (10, 24), (11, 23), (11, 22),
    (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16),
)  # fmt: skip
NEXTFLOW_BASE_GRIDS: tuple[Grid, ...] = (
    *_WIDE_BASE_GRIDS,
    (16, 16),
    *((width, height) for height, width in reversed(_WIDE_BASE_GRIDS)),
)
"""The paper's 41 grids at side 16, wide to tall (Table 14, column of the 256 level's last scale)."""


@dataclass(frozen=True, kw_only=True)
class ScaleSchedule:
    """The grids of all scales of an image, for every level and aspect ratio. The defaults are the paper's."""

    sides: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
    """Side of the square grid of each scale, in cells, strictly growing from 1."""
    levels: dict[int, int] = field(default_factory=lambda: {256: 12, 512: 16, 1024: 18})
    """Level (pixels of a square image's side) to its number of scales. Default: 256: 12, 512: 16, 1024: 18."""
    stride: int = 16
    """Pixels per cell of a level's last grid."""
    base_grids: tuple[Grid, ...] = NEXTFLOW_BASE_GRIDS
    """One grid (height, width) per aspect ratio, all of about the area of the one square grid among them."""

    def __post_init__(self) -> None:
        # Frozen; JSON gives lists and string keys, which become tuples and integers here.
        set_field = object.__setattr__
        set_field(self, "sides", tuple(int(side) for side in self.sides))
        levels = sorted((int(level), int(count)) for level, count in self.levels.items())
        set_field(self, "levels", dict(levels))
        set_field(self, "base_grids", tuple((int(height), int(width)) for height, width in self.base_grids))
        if not self.sides or self.sides[0] != 1 or any(a >= b for a, b in pairwise(self.sides)):
            raise ValueError(f"schedule.sides must grow strictly from 1, got {self.sides}")
        if sum(height == width for height, width in self.base_grids) != 1:
            raise ValueError("schedule.base_grids must hold exactly one square grid: it sets the unit of all others")
        for level, count in self.levels.items():
            if not 1 <= count <= len(self.sides):
                raise ValueError(f"schedule.levels: level {level} asks for {count} of {len(self.sides)} scales")
            if self.sides[count - 1] * self.stride != level:
                raise ValueError(
                    f"schedule.levels: level {level} must be stride x side of its last scale, "
                    f"but {self.stride} x {self.sides[count - 1]} = {self.sides[count - 1] * self.stride}"
                )

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    @classmethod
    def nextflow(cls) -> ScaleSchedule:
        """The paper's schedule: 900 / 3,684 / 10,084 codes for square images of level 256 / 512 / 1024."""
        return cls()

    @property
    def base_side(self) -> int:
        """Side of the square base grid, in cells: the unit in which the base grids are given."""
        return next(height for height, width in self.base_grids if height == width)

    def num_scales(self, level: int) -> int:
        """Number of scales of `level`. Raises ValueError for a level that the schedule does not have."""
        if level not in self.levels:
            raise ValueError(f"level {level} does not exist; the schedule has {', '.join(map(str, self.levels))}")
        return self.levels[level]

    def base_grid(self, aspect_ratio: float = 1.0) -> Grid:
        """The base grid nearest to `aspect_ratio` (height / width) in log ratio.

        Raises ValueError when the ratio lies outside the schedule's range (1:4 to 4:1 in the paper).
        """
        ratios = [height / width for height, width in self.base_grids]
        lowest, highest = min(ratios), max(ratios)
        # A thousandth of slack: images whose sides were rounded to whole pixels stay inside.
        if not (math.isfinite(aspect_ratio) and lowest * 0.999 <= aspect_ratio <= highest * 1.001):
            raise ValueError(
                f"aspect_ratio {aspect_ratio:g} (height / width) does not exist; "
                f"the schedule has ratios from {lowest:g} to {highest:g}"
            )
        distances = [abs(math.log(ratio / aspect_ratio)) for ratio in ratios]
        return self.base_grids[distances.index(min(distances))]

    def grids(self, level: int, aspect_ratio: float = 1.0) -> tuple[Grid, ...]:
        """Grids of all scales of an image, coarse to fine.

        Args:
            level: training resolution, one of `levels`.
            aspect_ratio: height / width; the nearest base grid is taken.
        """
        return _grids(self.sides[: self.num_scales(level)], self.base_grid(aspect_ratio), self.base_side)

    def nearest_level(self, height: int, width: int) -> int:
        """The level whose area is nearest, in log, to that of an image of `height` x `width` pixels."""
        return min(self.levels, key=lambda level: abs(math.log(height * width / level**2)))

    def native_grids(self, height: int, width: int) -> tuple[Grid, ...]:
        """Grids of all scales of an image of any size and ratio, coarse to fine.

        The last grid is (height, width) / stride. The nearest level gives the number of scales and their sides, and the
        earlier grids stand in proportion to the last, rounded as all grids of the schedule. An image of a bucket's size
        has the grids of that bucket (of the nearest in ratio, where several share their last grid).

        Args:
            height, width: in pixels, multiples of the stride (`sequence.native` pads or cuts images to them).

        Raises ValueError when a side is no positive multiple of the stride.
        """
        last = (height // self.stride, width // self.stride)
        if min(last) < 1 or (last[0] * self.stride, last[1] * self.stride) != (height, width):
            raise ValueError(
                f"an image of {height} x {width} pixels has no grid: both sides must be multiples of the stride "
                f"{self.stride}; pad or cut it first"
            )
        nearest = self.nearest_level(height, width)
        for level in (nearest, *self.levels):
            sides = self.sides[: self.levels[level]]
            same = [base for base in self.base_grids if _grids(sides, base, self.base_side)[-1] == last]
            if same:
                base = min(same, key=lambda grid: abs(math.log(grid[0] / grid[1] * last[1] / last[0])))
                return _grids(sides, base, self.base_side)
        sides = self.sides[: self.levels[nearest]]
        if len(sides) == 1:
            raise ValueError(
                f"level {nearest} has the 1x1 scale alone; an image of {height} x {width} pixels needs more"
            )
        return _grids(sides, last, sides[-1])

    def num_codes(self, level: int, aspect_ratio: float = 1.0) -> int:
        """Number of codes of an image over all scales."""
        return num_codes_of(self.grids(level, aspect_ratio))

    def pixels(self, level: int, aspect_ratio: float = 1.0) -> tuple[int, int]:
        """Height and width of the image in pixels: the last grid times the stride."""
        height, width = self.grids(level, aspect_ratio)[-1]
        return height * self.stride, width * self.stride

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` is the inverse."""
        return {
            "sides": list(self.sides),
            "levels": {str(level): count for level, count in self.levels.items()},
            "stride": self.stride,
            "base_grids": [list(grid) for grid in self.base_grids],
        }

    @classmethod
    def from_dict(cls, values: dict) -> ScaleSchedule:
        """Rebuild a schedule from `to_dict`; unknown keys raise TypeError."""
        return cls(**values)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name this schedule: equal schedules have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def num_codes_of(grids: tuple[Grid, ...]) -> int:
    """Number of codes of an image with these grids."""
    return sum(height * width for height, width in grids)


@lru_cache(maxsize=4096)
def _grids(sides: tuple[int, ...], base_grid: Grid, base_side: int) -> tuple[Grid, ...]:
    def cells(base: int, side: int) -> int:
        return max(1, round(base * side / base_side))

    return ((1, 1), *((cells(base_grid[0], side), cells(base_grid[1], side)) for side in sides[1:]))
