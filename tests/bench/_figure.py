"""The figures that are printed, and the comparison of two sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Figure:
    """A measurement. `ratio` is relative to `to`. `at_most` and `at_least` are its targets, `within` is the value's."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    to: str = ""
    at_most: float | None = None
    at_least: float | None = None
    within: float | None = None

    @property
    def missed(self) -> bool:
        """Returns whether a target is missed."""
        return not all(met for _, met in self._targets())

    def _targets(self) -> list[tuple[str, bool]]:
        """Yields each target in words, and whether it is met."""
        found = []
        if self.ratio is not None and self.at_most is not None:
            found.append((f"at most {self.at_most:.2f}", self.ratio <= self.at_most))
        if self.ratio is not None and self.at_least is not None:
            found.append((f"at least {self.at_least:.2f}", self.ratio >= self.at_least))
        if self.within is not None:
            found.append((f"at most {self.within:g} {self.unit}", self.value <= self.within))
        return found

    def __str__(self) -> str:
        words = []
        if self.ratio is not None:
            words.append(f"{self.ratio:.{_places(self.ratio)}f} of {self.to}")
        elif self.to:
            words.append(self.to)
        words += [f"target: {target}, {'met' if met else 'missed'}" for target, met in self._targets()]
        told = f" ({'; '.join(words)})" if words else ""
        return f"{self.name} {_number(self.value)} {self.unit}{told}"


class Pairs:
    """Two sides, measured in turns, so that other load affects both alike."""

    def __init__(self, ours: Sequence[float] = (), bare: Sequence[float] = ()) -> None:
        self.ours = list(ours)
        self.bare = list(bare)

    def add(self, ours: float, bare: float) -> None:
        """Adds a pair."""
        self.ours.append(ours)
        self.bare.append(bare)

    @property
    def value(self) -> float:
        """Returns the median of our side."""
        return median(self.ours)

    @property
    def other(self) -> float:
        """Returns the median of the other side."""
        return median(self.bare)

    @property
    def ratio(self) -> float:
        """Returns the median of the ratios of the pairs."""
        return median(a / b for a, b in zip(self.ours, self.bare, strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest value that `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _places(value: float) -> int:
    return 2 if value >= 0.1 else 3


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
