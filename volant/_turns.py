"""So much a turn: how busy relays and log pumps leave room for everybody else.

Trio runs every task that is ready before it looks at the sockets again, so a request that arrives while fifty relays
each move a piece waits for all of them, once for every turn that it needs itself. `Turns` lets relays move a bounded
number of bytes, together, between two looks at the sockets; those that come too late wait for the next turn, one VM
after the other, so that a VM with many streams gets no more than one with one. Log pumps have turns of their own, in
lines.

`Bucket` bounds how much one VM gets over time.

The next turn is announced by `run_sync_soon`, which Trio runs after it has looked at the sockets: no task is kept for
it, and none polls.
"""

from __future__ import annotations

from collections import OrderedDict, deque

import trio


class Bucket:
    """An allowance that refills with time up to `burst`. Whoever overspends it waits."""

    def __init__(self, rate: float, burst: float) -> None:
        """`rate`: so much a second."""
        self._rate = rate
        self._burst = self._left = burst
        self._at: float | None = None

    def spend(self, amount: float, now: float) -> float:
        """Seconds to wait, 0 as a rule, after `amount` was taken at `now`."""
        passed = 0.0 if self._at is None else now - self._at
        self._left = min(self._burst, self._left + passed * self._rate) - max(0.0, amount)
        self._at = now
        return max(0.0, -self._left / self._rate)


class Turns:
    """A budget, of bytes for instance, shared by keys (VMs) in rotation. When it is used up, the scheduler's next turn
    renews it.

    Not each turn, as announcing one costs a small message a sixth of what it costs altogether.
    """

    def __init__(self, per_turn: int = 256 * 1024) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._armed = False
        self._waiting: OrderedDict[int, deque[_Waiter]] = OrderedDict()

    async def take(self, key: int, count: int) -> None:
        """Return when so much may be done for `key`. What is larger than the budget uses up a whole turn."""
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
        """How many relays wait, and for how many VMs."""
        return {"waiting": sum(map(len, self._waiting.values())), "keys": len(self._waiting)}

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left <= 0:
            self._arm()

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            trio.lowlevel.current_trio_token().run_sync_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._armed = False
        self._left = self._per_turn
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
