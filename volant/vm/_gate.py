"""At most so many VMs boot at a time.

A boot costs seconds of a processor. When a host comes back with two hundred VMs to start, or somebody creates as many,
all at once would mean that each takes as long as all of them, and that every one misses its deadline. So a boot first
waits for its turn, and no deadline runs meanwhile: those who came first go first, and the turn ends with the agent's
answer, with the boot, or after `TURN_S`. The last is so that a few guests which never answer hold up nobody else for
the whole of their deadlines.

A process that is there already, as an actor or the daemon has begun anew, has its turn without waiting, even when
there are too many then: it boots anyway.
"""

from __future__ import annotations

import trio

TURN_S = 30.0
"""Longer than a guest takes to answer, even when there are some at once; who takes longer goes on beside the others."""


class BootGate:
    """Whose turn it is to boot, by the ids of VMs."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._inside: set[int] = set()
        self._waiting: dict[int, trio.Event] = {}
        """In the order in which they came."""

    async def enter(self, vm_id: int) -> None:
        """Wait for a turn; one that has it keeps it. Cancelled, it has neither turn nor place."""
        if vm_id in self._inside or (len(self._inside) < self.limit and not self._waiting):
            self._inside.add(vm_id)
            await trio.lowlevel.checkpoint()
            return
        event = self._waiting[vm_id] = trio.Event()
        try:
            await event.wait()
        except BaseException:
            self.leave(vm_id)
            raise

    def take(self, vm_id: int) -> None:
        """Have a turn at once: it boots already."""
        self._inside.add(vm_id)

    def leave(self, vm_id: int) -> None:
        """The turn is over; without one nothing happens."""
        self._inside.discard(vm_id)
        self._waiting.pop(vm_id, None)
        while self._waiting and len(self._inside) < self.limit:
            first = next(iter(self._waiting))
            self._inside.add(first)
            self._waiting.pop(first).set()

    def inspect(self, vm_id: int) -> dict[str, object] | None:
        """How it stands with one VM, ready for JSON; None: it has no turn and wants none."""
        if vm_id in self._inside:
            return {"state": "booting", "limit": self.limit}
        if vm_id in self._waiting:
            return {"state": "waiting", "ahead": list(self._waiting).index(vm_id), "limit": self.limit}
        return None

    def statistics(self) -> dict[str, int]:
        """Figures, ready for JSON."""
        return {"limit": self.limit, "booting": len(self._inside), "waiting": len(self._waiting)}
