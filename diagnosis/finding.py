"""What a check says: something found, or something that it could not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["fault", "warning", "note"]
"""fault: the result is not what it should be. warning: look at it. note: worth knowing. Only faults fail a command."""

SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence in three parts."""

    severity: Severity
    about: str
    """What it is about, in a word or two."""
    seen: str
    """What the run shows."""
    expected: str
    """What a healthy run shows."""
    advice: str
    """What to do, with the key of the config."""

    @property
    def sentence(self) -> str:
        """The parts together."""
        return f"{self.seen} (expected: {self.expected}): {self.advice}."


@dataclass(frozen=True)
class Missing:
    """A metric that the run did not leave behind, so that something was not checked."""

    what: str
    how: str
    """What would make the run log it."""


def number(value: float) -> str:
    """Three digits that are worth reading: 0.0512, 23.1, 4096."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
