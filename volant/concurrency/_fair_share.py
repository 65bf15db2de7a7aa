"""Rate limits that keep busy relays and log pumps from starving other tasks of the event loop.

Trio runs every task that is ready before it polls the sockets again. A request that arrives while fifty relays each
move a piece waits for all of them, once for each pass of the event loop that it needs itself. `FairShare` limits the
bytes that all relays together move in one pass. Later relays wait for the next pass, and VMs are served in rotation: a
VM with many streams gets no more than a VM with one. Log pumps have their own `FairShare`, counted in lines.

`TokenBucket` limits the use of one VM over time.

`run_sync_soon` announces the next pass, as Trio runs its callbacks after it has polled the sockets. No task is kept for
that, and nothing polls.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio


class NoPlace(Exception):
    """All places are taken. The text names their number and their owner."""


class Places:
    """A number of places, shared by projects."""

    def __init__(self, total: int, each: int) -> None:
        """
        :param total: places of all projects together
        :param each: places of one project
        """
        self._total = total
        self._each = each
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, project: str) -> Iterator[None]:
        """Takes a place for the block. :raises NoPlace:"""
        if self._taken[project] >= self._each:
            raise NoPlace(f"{self._each} of project {project!r}")
        if self._taken.total() >= self._total:
            raise NoPlace(f"{self._total} of all projects")
        self._taken[project] += 1
        try:
            yield
        finally:
            self._taken[project] -= 1
            if not self._taken[project]:
                del self._taken[project]


class TokenBucket:
    """An allowance that refills with time, up to `burst`. A caller that overspends it waits."""

    def __init__(self, rate: float, burst: float) -> None:
        """Creates it. `rate` is in tokens per second."""
        self._rate = rate
        self._burst = self._left = burst
        self._at: float | None = None

    def spend(self, amount: float, now: float) -> float:
        """Takes `amount` at the time `now`, in seconds, and returns the seconds to wait, usually 0."""
        passed = 0.0 if self._at is None else now - self._at
        self._left = min(self._burst, self._left + passed * self._rate) - max(0.0, amount)
        self._at = now
        return max(0.0, -self._left / self._rate)


class FairShare:
    """A budget for one pass of the event loop, shared by keys (VMs) in rotation.

    It is renewed in the first pass after it was used up, not in every pass: announcing a pass costs a small message a
    sixth of its total cost.
    """

    def __init__(self, per_pass: int = 256 * 1024) -> None:
        self._per_pass = per_pass
        self._left = per_pass
        self._armed = False
        self._waiting: OrderedDict[int, deque[_Waiter]] = OrderedDict()

    async def take(self, key: int, count: int) -> None:
        """Waits until `key` may spend `count`. A count above the budget uses up a whole pass."""
        if self._left > 0 and not self._waiting:
            self._spend(count)
            return
        waiter = _Waiter(count)
        queue = self._waiting.setdefault(key, deque())
        queue.append(waiter)
        self._arm()
        try:
            await waiter.granted.wait()
        except trio.Cancelled:
            if not waiter.granted.is_set():
                queue.remove(waiter)
                if not queue:
                    del self._waiting[key]
            raise

    def statistics(self) -> dict[str, int]:
        """Returns how many callers wait, and for how many keys."""
        return {"waiting": sum(map(len, self._waiting.values())), "keys": len(self._waiting)}

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left <= 0:
            self._arm()

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            trio.lowlevel.current_trio_token().run_sync_soon(self._renew)

    def _renew(self) -> None:
        self._armed = False
        self._left = self._per_pass
        while self._left > 0 and self._waiting:
            key, queue = self._waiting.popitem(last=False)
            waiter = queue.popleft()
            if queue:
                self._waiting[key] = queue
            waiter.granted.set()
            self._spend(waiter.count)
        if self._waiting:
            self._arm()


class _Waiter:
    __slots__ = ("count", "granted")

    def __init__(self, count: int) -> None:
        self.count = count
        self.granted = trio.Event()
