"""Counters for the metrics of the API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from volant.model import Event

COMMIT_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""From a fast disk to the deadline of a commit."""


class Histogram:
    """Counts durations by upper bound, and sums them up."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.bounds_s = tuple(bounds_s)
        self.sum_s = 0.0
        self._counts = [0] * (len(bounds_s) + 1)

    def observe(self, seconds: float) -> None:
        self.sum_s += seconds
        for place, bound in enumerate(self.bounds_s):
            if seconds <= bound:
                self._counts[place] += 1
                return
        self._counts[-1] += 1

    def cumulative(self) -> list[tuple[float, int]]:
        """Returns each bound with the number of durations up to it. The last bound is infinity."""
        return list(zip((*self.bounds_s, float("inf")), accumulate(self._counts), strict=True))


class Figures:
    """Holds the counters of one daemon. They survive restarts of the journal's actor."""

    def __init__(self) -> None:
        self.commits = Histogram(COMMIT_BOUNDS_S)
        self.failed_commits = 0
        self.records = 0
        """Audit records that were written."""
        self.lost_records = 0
        """Refusals whose record could not be written."""
        self.events: Counter[str] = Counter()
        """Events by type."""
        self.failures: Counter[str] = Counter()
        """Crashes of VMs by the code of their reason."""
        self.fallbacks: Counter[str] = Counter()
        """Cold boots after a failed clone, by the code of its reason."""

    def count(self, events: Iterable[Event]) -> None:
        """Count events that were published."""
        for event in events:
            self.events[event.type] += 1
            if event.reason is not None:
                self.failures[event.reason.code] += 1
