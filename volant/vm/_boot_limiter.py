"""At most so many boots at a time.

A boot costs seconds of a processor. When a host comes back with two hundred VMs to start, or somebody creates as many,
all at once would mean that each takes as long as all of them, and that every one misses its deadline. So a boot first
waits for its turn, and no deadline runs meanwhile: those who came first go first, and the turn ends with the agent's
answer, with the boot, or after `SLOT_S`. The last is so that a few guests which never answer hold up nobody else for
the whole of their deadlines. What becomes a template boots, too: it has its turn once no VM waits for one.

While the daemon drains nobody gets a turn, so whoever waited when that began goes on waiting.

A process that is there already, as an actor or the daemon has begun anew, has its turn without waiting, even when
there are too many then: it boots anyway.
"""

from __future__ import annotations

import trio

from volant.journal import Projection

SLOT_S = 30.0
"""Longer than a guest takes to answer, even when there are some at once; who takes longer goes on beside the others."""

CLONES_AT_ONCE = 8
"""A clone is done in a tenth of a second, and most of that is QEMU's start."""

Who = int | str
"""The id of a VM, or the name of a template."""


class BootLimiter:
    """Whose turn it is to boot."""

    def __init__(self, limit: int, projection: Projection | None = None) -> None:
        """`projection`: knows whether the daemon drains; None: it never does."""
        self.limit = limit
        self._projection = projection
        self._inside: set[Who] = set()
        self._held: set[Who] = set()
        self._waiting: dict[Who, trio.Event] = {}
        """In the order in which they came."""
        self._last: dict[Who, trio.Event] = {}
        """Likewise, of those who come after all of these."""

    async def acquire(self, who: Who, *, last: bool = False) -> None:
        """Wait for a turn; one that has it keeps it. Cancelled, it has neither turn nor place. `last`: behind all who
        wait without."""
        while True:
            if self._projection is not None and self._projection.drain is not None:
                self._held.add(who)
                try:
                    await self._projection.undrained()
                finally:
                    self._held.discard(who)
            await self._acquire(who, self._last if last else self._waiting)
            if self._projection is None or self._projection.drain is None:
                return
            self.release(who)

    async def _acquire(self, who: Who, queue: dict[Who, trio.Event]) -> None:
        if who in self._inside or (len(self._inside) < self.limit and not self._waiting):
            self._inside.add(who)
            await trio.lowlevel.checkpoint()
            return
        event = queue[who] = trio.Event()
        try:
            await event.wait()
        except BaseException:
            self.release(who)
            raise

    def force(self, who: Who) -> None:
        """Have a turn at once: it boots already."""
        self._inside.add(who)

    def release(self, who: Who) -> None:
        """The turn is over; without one nothing happens."""
        self._inside.discard(who)
        for queue in (self._waiting, self._last):
            queue.pop(who, None)
        while (queue := self._waiting or self._last) and len(self._inside) < self.limit:
            first = next(iter(queue))
            self._inside.add(first)
            queue.pop(first).set()

    @property
    def in_use(self) -> bool:
        """Whether anybody has a turn."""
        return bool(self._inside)

    def inspect(self, who: Who) -> dict[str, object] | None:
        """How it stands with one, ready for JSON; None: it has no turn and wants none."""
        if who in self._inside:
            return {"state": "booting", "limit": self.limit}
        if who in self._held:
            return {"state": "held", "limit": self.limit}
        waiting = [*self._waiting, *self._last]
        if who in waiting:
            return {"state": "waiting", "ahead": waiting.index(who), "limit": self.limit}
        return None

    def statistics(self) -> dict[str, int]:
        """Figures, ready for JSON."""
        waiting = len(self._waiting) + len(self._last) + len(self._held)
        return {"limit": self.limit, "booting": len(self._inside), "waiting": waiting}
