"""Seeds Trio's scheduler, by its private switches, and sees whether a task waits until no other can run.

Trio shuffles each batch of runnable tasks on purpose, so that no program relies on an order. The shuffle draws from one
module-wide `Random`, and a flag makes it independent of the order of a set. Both exist so that Hypothesis can replay a
test (trio#840, trio#890). They are private, and Trio's own tests pin them (`test_scheduler_determinism.py`). Nothing
else in this package uses private parts of Trio.

Checked with trio 0.35. A public way to seed the scheduler (trio#239) will replace this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import trio


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
    """Whether a task of this run waits in `wait_all_tasks_blocked`. It goes on before time does."""
    run: Any = trio._core._run
    return bool(run.GLOBAL_RUN_CONTEXT.runner.waiting_for_idle)
