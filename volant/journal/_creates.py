"""When VMs were created. Forgotten by a restart of the daemon."""

from __future__ import annotations

from collections import Counter, deque
from datetime import datetime, timedelta

_WITHIN = timedelta(minutes=1)
_MOST = 10_000
"""Of one project; more are not created within a minute."""


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
