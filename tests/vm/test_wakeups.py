"""The rate of wake-ups counts from one inspection to the next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from volant.host import Host, ProcessGone
from volant.model import ProcessIdentity
from volant.vm._process import Wakeups

IDENTITY = ProcessIdentity(pid=7, start_time=1, boot_id="boot", tag="volant-ab12-7.1")


def test_the_rate_counts_from_the_inspection_before() -> None:
    figures = iter([(10.0, 500), (10.5, 510), (14.0, 540), (16.0, 530)])
    now = 0.0

    def wakeups(identity: ProcessIdentity) -> int:
        nonlocal now
        now, total = next(figures, (0.0, -1))
        if total < 0:
            raise ProcessGone("it has ended")
        return total

    fake: Any = SimpleNamespace(proc=SimpleNamespace(wakeups=wakeups), clock=SimpleNamespace(monotonic=lambda: now))
    counter = Wakeups(cast(Host, fake), IDENTITY)
    assert counter.inspect() == {"total": 500, "per_s": None, "over_s": None}
    # Half a second later is too early.
    assert counter.inspect() == {"total": 510, "per_s": None, "over_s": None}
    assert counter.inspect() == {"total": 540, "per_s": 10.0, "over_s": 4.0}
    # Threads have ended, and their wake-ups with them.
    assert counter.inspect() == {"total": 530, "per_s": 0.0, "over_s": 2.0}
    assert counter.inspect() is None
