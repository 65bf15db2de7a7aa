"""Virtual time, which jumps to the next deadline as soon as every task waits.

`trio.testing.MockClock` does the same, in a second turn of Trio's loop for each jump: it first checks whether something
else happens in between. In a simulation nothing does, except in `allow_real`, which holds the clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import trio

# Seeds Trio's scheduler, by its private switches, and sees whether a task waits until no other can run.
#
# Trio shuffles each batch of runnable tasks on purpose, so that no program relies on an order. The shuffle draws from
# one module-wide `Random`, and a flag makes it independent of the order of a set. Both exist so that Hypothesis can
# replay a test (trio#840, trio#890). They are private, and Trio's own tests pin them (`test_scheduler_determinism.py`).
# Nothing else in this package uses private parts of Trio.
#
# Checked with trio 0.35. A public way to seed the scheduler (trio#239) will replace this module.


@contextmanager
def seeded_scheduling(random: Random) -> Iterator[None]:
    """Lets `random` decide the order of tasks during the block.

    :raises RuntimeError: this version of Trio has other switches.
    """
    run: Any = trio._core._run
    if not hasattr(run, "_ALLOW_DETERMINISTIC_SCHEDULING") or not hasattr(run, "_r"):
        raise RuntimeError(f"trio {trio.__version__} has a scheduler that actors.testing cannot seed; use trio 0.35")
    before = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r
    run._ALLOW_DETERMINISTIC_SCHEDULING, run._r = True, random
    try:
        yield
    finally:
        run._ALLOW_DETERMINISTIC_SCHEDULING, run._r = before


def waits_for_idle() -> bool:
    """Returns whether a task of this run waits in `wait_all_tasks_blocked`. It goes on before time does."""
    run: Any = trio._core._run
    return bool(run.GLOBAL_RUN_CONTEXT.runner.waiting_for_idle)


_LONG_S = 86_400.0


class JumpingClock(trio.abc.Clock):
    """A virtual clock that begins at 0."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self.held = False
        """Whether the clock is stopped, as real work is in progress."""

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
