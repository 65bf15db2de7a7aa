"""Virtual time, which jumps to the next deadline as soon as every task waits.

`trio.testing.MockClock` does the same, in a second turn of Trio's loop for each jump: it looks first whether something
else happens meanwhile. In a simulation nothing does, except in `allow_real`, which holds the clock.
"""

from __future__ import annotations

import math

import trio

from ._switches import waits_for_idle

_LONG_S = 86_400.0


class JumpingClock(trio.abc.Clock):
    """Begins at 0."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self.held = False
        """Whether it stands, as something real is under way."""

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        # Trio asks when no task can run.
        if self.held or waits_for_idle():
            return _LONG_S if deadline > self._now_s else 0
        if self._now_s < deadline < math.inf:
            self._now_s = deadline
        return 0
