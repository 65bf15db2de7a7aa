"""Deterministic scheduling, by the private switches of Trio.

Trio shuffles each batch of runnable tasks, on purpose, so that no program relies on an order. The shuffle draws from
one module-wide `Random`, and a flag makes it independent of where the tasks happened to be in a set. Both exist so that
Hypothesis can replay a test (trio#840, trio#890), both are private, and Trio's own tests hold them
(`test_scheduler_determinism.py`). Nothing else of this package uses anything private of Trio.

Seen in trio 0.35. A public way to seed a run's scheduler, wanted in trio#239, will remove this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import trio


@contextmanager
def seeded_scheduling(random: Random) -> Iterator[None]:
    """Lets `random` decide the order of tasks for as long as the block runs; whatever was there before comes back.

    :raises RuntimeError: this version of Trio has no such switches.
    """
    run: Any = trio._core._run
    if not hasattr(run, "_ALLOW_DETERMINISTIC_SCHEDULING") or not hasattr(run, "_r"):
        raise RuntimeError(
            f"trio {trio.__version__} schedules in a way that actors.testing does not know; the one it knows is 0.35"
        )
    before = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r
    run._ALLOW_DETERMINISTIC_SCHEDULING, run._r = True, random
    try:
        yield
    finally:
        run._ALLOW_DETERMINISTIC_SCHEDULING, run._r = before
