"""One figure a line, and how two sides are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Figure:
    """What was measured. `ratio` is to what `to` says; `at_most` and `at_least` bound it, `within` the value."""

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
        """Whether there is a target, and it is not met."""
        return not all(met for _, met in self._targets())

    def _targets(self) -> list[tuple[str, bool]]:
        """Each in words, and whether it is met."""
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
    """Two sides, measured in turns, so that what else happens on the machine meets both alike."""

    def __init__(self, ours: Sequence[float] = (), bare: Sequence[float] = ()) -> None:
        self.ours = list(ours)
        self.bare = list(bare)

    def add(self, ours: float, bare: float) -> None:
        """One more pair."""
        self.ours.append(ours)
        self.bare.append(bare)

    @property
    def value(self) -> float:
        """The median of our side."""
        return median(self.ours)

    @property
    def other(self) -> float:
        """The median of the other side."""
        return median(self.bare)

    @property
    def ratio(self) -> float:
        """The median of the ratios of the pairs."""
        return median(a / b for a, b in zip(self.ours, self.bare, strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _places(value: float) -> int:
    return 2 if value >= 0.1 else 3


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
