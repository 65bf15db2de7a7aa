"""Counts how often a VM's process wakes up, which is what an idle VM costs.

Each timer of the guest and each byte of its devices wakes threads of QEMU, for some 40 microseconds of a CPU each. So
the rate shows whether a guest is idle, and which workload keeps it awake.
"""

from __future__ import annotations

from volant.host import Host, ProcessGone
from volant.model import ProcessIdentity

_AT_LEAST_S = 1.0
"""Rates over less time are noise."""


class Wakeups:
    """The wake-ups of one process, over all its threads."""

    def __init__(self, host: Host, identity: ProcessIdentity) -> None:
        self._host = host
        self._identity = identity
        self._before: tuple[float, int] | None = None

    def inspect(self) -> dict[str, object] | None:
        """Returns the total, and the rate since the last inspection, if there was one. None: the process has ended."""
        try:
            total = self._host.proc.wakeups(self._identity)
        except ProcessGone:
            return None
        now = self._host.clock.monotonic()
        if self._before is None:
            self._before = now, total
        then, before = self._before
        if now - then < _AT_LEAST_S:
            return {"total": total, "per_s": None, "over_s": None}
        self._before = now, total
        return {
            "total": total,
            "per_s": round(max(0, total - before) / (now - then), 1),
            "over_s": round(now - then, 1),
        }
