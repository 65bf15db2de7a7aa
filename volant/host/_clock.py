"""The facet for the time. Deadlines use Trio's clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def now(self) -> datetime:
        """Returns the time of day in UTC. It may jump."""

    def monotonic(self) -> float:
        """Returns seconds on a clock that does not jump, to measure with."""

    def boottime(self) -> float:
        """Returns seconds since the host was booted. Nobody sets this clock, and it goes on while the host sleeps."""


class LinuxClock(Clock):
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
