"""A metric over the steps of a run, and what can be said about it in spite of its noise.

Nothing here assumes a shape of the curve: noise is estimated from second differences, which a straight trend does not change,
and a rise or fall counts when it is several times the error of the means that it is the difference of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

SURE = 4.0
"""Standard errors by which two means have to differ to be called different."""


@dataclass(frozen=True)
class Rise:
    """A curve that has left its lowest point for good."""

    step: int
    """Of the lowest point, smoothed."""
    low: float
    end: float


@dataclass(frozen=True)
class Curve:
    """Values at rising steps."""

    name: str
    step_N: np.ndarray
    value_N: np.ndarray

    def __len__(self) -> int:
        return len(self.step_N)

    def since(self, step: int) -> Curve:
        """The part from `step` on."""
        return self._where(self.step_N >= step)

    def behind(self, fraction: float) -> Curve:
        """The part behind the first `fraction` of its steps."""
        if not len(self):
            return self
        return self.since(int(self.step_N[0] + fraction * (self.step_N[-1] - self.step_N[0])))

    @cached_property
    def finite(self) -> Curve:
        """Without NaN and infinities."""
        return self._where(np.isfinite(self.value_N))

    @cached_property
    def noise(self) -> float:
        """Standard deviation of a point about the trend; 0 with fewer than 4 points, which cannot tell."""
        if len(self) < 4:
            return 0.0
        # x(i+1) - 2 x(i) + x(i-1) has 6 times the variance of x; the median is not moved by a few spikes.
        return float(np.median(np.abs(np.diff(self.value_N, n=2))) / 0.6745 / np.sqrt(6))

    @property
    def start(self) -> float:
        """Mean of the first fifth."""
        return float(self.value_N[: self._fifth].mean())

    @property
    def end(self) -> float:
        """Mean of the last fifth."""
        return float(self.value_N[-self._fifth :].mean())

    @property
    def last(self) -> float:
        """The last value."""
        return float(self.value_N[-1])

    @property
    def median(self) -> float:
        """Of all values."""
        return float(np.median(self.value_N))

    @property
    def change(self) -> float:
        """From start to end; 0 where that may be noise."""
        difference = self.end - self.start
        return difference if abs(difference) > SURE * self.noise * np.sqrt(2 / self._fifth) else 0.0

    def at(self, step: int, window: int) -> float | None:
        """Mean of the points of the `window` steps up to `step`, or None where there are none."""
        value_N = self.value_N[(self.step_N > step - window) & (self.step_N <= step)]
        return float(value_N.mean()) if len(value_N) else None

    def rise(self) -> Rise | None:
        """The rise from the lowest point, when it is beyond noise and a tenth of what was gained before."""
        width = max(1, len(self) // 10)
        if len(self) < 4:
            return None
        value_N = np.convolve(self.value_N, np.full(width, 1 / width), mode="valid")
        low = int(value_N.argmin())
        rise, gained = value_N[-1] - value_N[low], value_N[0] - value_N[low]
        # The lowest of many means lies low by chance: 1.5.
        enough = max(1.5 * SURE * self.noise * np.sqrt(2 / width), 0.1 * gained, 0.03 * abs(value_N[low]))
        if low >= len(value_N) - max(2, width) or rise <= enough:
            return None
        return Rise(int(self.step_N[low + width - 1]), float(value_N[low]), float(value_N[-1]))

    @property
    def _fifth(self) -> int:
        return max(1, len(self) // 5)

    def _where(self, chosen_N: np.ndarray) -> Curve:
        return Curve(self.name, self.step_N[chosen_N], self.value_N[chosen_N])
