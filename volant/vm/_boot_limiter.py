"""Limits how many boots run at a time.

A boot costs seconds of a processor. Two hundred at once would each take as long as all of them together, and miss their
deadlines. So a boot first waits for a slot, and no deadline runs meanwhile. The boot that is due the longest gets the
next one: boots that begin together are prepared together, and are ready in any order. A boot holds its slot until the
agent answers, the boot fails, or `SLOT_S` is over, so that guests that never answer don't delay the others for the
whole of their deadlines. The build of a template waits until no VM does.

While the daemon drains nobody gets a slot. A boot whose process is there already, as an actor or the daemon has started
again, gets one at once, even beyond the limit: it boots anyway.
"""

from __future__ import annotations

import msgspec
import trio

from volant.journal import Projection

SLOT_S = 30.0
"""How long a boot holds its slot: longer than a guest takes to answer, even if several boot at once. A slower boot
continues without a slot."""

BootId = int | str
"""The id of a VM, or the digest of a template."""


class _Waiting(msgspec.Struct):
    due: tuple[float, int]
    served: trio.Event = msgspec.field(default_factory=trio.Event)


def _in_order(queue: dict[BootId, _Waiting]) -> list[BootId]:
    return sorted(queue, key=lambda boot: queue[boot].due)


class BootLimiter:
    """Hands out boot slots."""

    def __init__(self, limit: int, projection: Projection | None = None) -> None:
        """`projection` shows whether the daemon drains; without it, it never does."""
        self.limit = limit
        self._projection = projection
        self._holders: set[BootId] = set()
        self._drained: set[BootId] = set()
        """Boots that wait for the end of a drain."""
        self._waiting: dict[BootId, _Waiting] = {}
        self._last: dict[BootId, _Waiting] = {}
        """Boots that wait behind all of those."""

    async def acquire(self, boot: BootId, *, due: tuple[float, int] = (0.0, 0), last: bool = False) -> None:
        """Waits for a slot; a boot that holds one keeps it.

        :param due: the time since which the boot is due, and a number that decides among equal times; the lowest gets
            the next slot. Equal boots get slots in the order of their calls.
        :param last: wait behind all boots without it
        """
        while True:
            if self._projection is not None and self._projection.drain is not None:
                self._drained.add(boot)
                try:
                    await self._projection.undrained()
                finally:
                    self._drained.discard(boot)
            await self._acquire(boot, due, self._last if last else self._waiting)
            if self._projection is None or self._projection.drain is None:
                return
            self.release(boot)

    async def _acquire(self, boot: BootId, due: tuple[float, int], queue: dict[BootId, _Waiting]) -> None:
        if boot in self._holders or (len(self._holders) < self.limit and not self._waiting):
            self._holders.add(boot)
            await trio.lowlevel.checkpoint()
            return
        place = queue[boot] = _Waiting(due)
        try:
            await place.served.wait()
        except BaseException:
            self.release(boot)
            raise

    def force(self, boot: BootId) -> None:
        """Takes a slot at once, for a boot that runs already."""
        self._holders.add(boot)

    def release(self, boot: BootId) -> None:
        """Returns the slot, or leaves the queue. Does nothing for a boot in neither."""
        self._holders.discard(boot)
        for queue in (self._waiting, self._last):
            queue.pop(boot, None)
        while (queue := self._waiting or self._last) and len(self._holders) < self.limit:
            first = _in_order(queue)[0]
            self._holders.add(first)
            queue.pop(first).served.set()

    @property
    def in_use(self) -> bool:
        """Whether any boot holds a slot."""
        return bool(self._holders)

    def inspect(self, boot: BootId) -> dict[str, object] | None:
        """Returns the state of one boot, ready for JSON; None if it neither holds a slot nor waits for one."""
        if boot in self._holders:
            return {"state": "booting", "limit": self.limit}
        if boot in self._drained:
            return {"state": "held", "limit": self.limit}
        waiting = [*_in_order(self._waiting), *_in_order(self._last)]
        if boot in waiting:
            return {"state": "waiting", "ahead": waiting.index(boot), "limit": self.limit}
        return None

    def statistics(self) -> dict[str, int]:
        """Returns figures, ready for JSON."""
        waiting = len(self._waiting) + len(self._last) + len(self._drained)
        return {"limit": self.limit, "booting": len(self._holders), "waiting": waiting}


def clones_at_once(processors: int) -> int:
    """Returns the number of clones that start at a time: enough to use all processors, also while one clone waits for
    the disk.

    More clones would share the processors, so all of them would be late, and switching costs processor time. On two
    processors, twenty clones took 10 s with eight at a time, and 6.7 s with three.
    """
    return processors + 1


class BootSlots(msgspec.Struct, frozen=True):
    """The slots of VMs' boots. Clones have their own, as they would wait for the cold boots of many."""

    cold: BootLimiter = msgspec.field(default_factory=lambda: BootLimiter(4))
    clones: BootLimiter = msgspec.field(default_factory=lambda: BootLimiter(clones_at_once(2)))

    def of(self, template: str | None) -> BootLimiter:
        """Returns the limiter for a boot from `template`; without it, for a cold boot."""
        return self.cold if template is None else self.clones

    @property
    def in_use(self) -> bool:
        """Whether any VM boots."""
        return self.cold.in_use or self.clones.in_use

    def release(self, vm_id: int) -> None:
        """Returns a VM's slots."""
        self.cold.release(vm_id)
        self.clones.release(vm_id)

    def inspect(self, vm_id: int) -> dict[str, object] | None:
        """Returns the state of a VM's boot, as `BootLimiter.inspect`."""
        return self.cold.inspect(vm_id) or self.clones.inspect(vm_id)
