"""The state of the journal that outlives its actor: what everybody may read, and counters for the metrics."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from itertools import accumulate
from pathlib import Path

import msgspec

from volant.host import Host
from volant.model import NOTHING_USED, Event, Networking, Used

from ._api_keys import ApiKeys
from ._audit import AuditLog
from ._events import EventLog
from ._projection import Projection
from ._responses import StoredResponses

COMMIT_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""The upper bounds of counted durations, from a commit on a fast disk to the deadline of a commit."""


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


_WITHIN = timedelta(minutes=1)
_MOST = 10_000
"""Maximum number of VMs that a project creates within a minute."""


class RecentCreates:
    """The creates of the last minute. Only the journal writes, after a commit."""

    def __init__(self) -> None:
        self._times: dict[str, deque[datetime]] = {}

    def of(self, project: str, now: datetime) -> int:
        """Returns how many there were in a project within a minute before `now`."""
        times = self._times.get(project)
        if times is None:
            return 0
        # A clock that was set back must not block a project for long.
        while times and not now - _WITHIN < times[0] <= now:
            times.popleft()
        if not times:
            del self._times[project]
        return len(times)

    def add(self, counts: Counter[str], now: datetime) -> None:
        """Takes over what a commit has created."""
        for project, count in counts.items():
            self.of(project, now)
            self._times.setdefault(project, deque(maxlen=_MOST)).extend([now] * count)


class Retention(msgspec.Struct, frozen=True):
    """The limits for stored events and audit records. All hold, and the newest ones always stay."""

    max_events: int = 1_000_000
    max_age_s: float = 7 * 86400.0
    max_records: int = 1_000_000
    records_max_age_s: float = 90 * 86400.0


class Store:
    """Holds what everybody may read of the journal. Built once for a daemon.

    `projection`, `events`, `audit`, `responses` and `keys` are empty until the `Journal` has started for the first
    time, and survive its restarts.
    """

    def __init__(
        self, host: Host, path: Path, *, retention: Retention | None = None, networking: Networking | None = None
    ) -> None:
        self.host = host
        self.path = path
        self.retention = retention or Retention()
        self.networking = networking or Networking()
        """Decides the networks and leases of new VMs."""
        self.projection = Projection()
        self.events = EventLog(host, path)
        self.audit = AuditLog(host, path)
        self.responses = StoredResponses()
        self.keys = ApiKeys()
        self.creates = RecentCreates()
        self.figures = Figures()
        self.used_elsewhere: Callable[[str], Used] = lambda project: NOTHING_USED
        """Returns the usage of a project on the other hosts of the fleet, which counts for its limits."""
        self.trouble: str | None = None
        """The reason why changes are refused at present; None while they are accepted."""
        self.ids_taken = 0
        """New ids are higher than this one. Lower ids may belong to VMs of which only the host has traces, or to other
        hosts."""
