"""The deadlines of asks and starts, and the timers: one heap for each system, watched by one task.

A cancel scope for every ask would cost nearly as much as the ask itself, and almost none of them ever fires. Here a
deadline is one entry in a heap. Entries whose ask is answered or whose timer is cancelled stay until they come up, or
until the heap has doubled. The watching task sleeps until the earliest entry, a stale one as well. So only an earlier
deadline wakes it, which is rare, as most deadlines of a program are about equally long.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Final, Protocol

import trio
from trio.lowlevel import ParkingLot

_SMALL: Final = 1024


class Entry(Protocol):
    """An ask, a start or a timer."""

    def over(self) -> bool:
        """Returns whether no task waits for the deadline any more."""
        ...

    def expire(self) -> None:
        """Is called at the deadline. Does nothing when it is over."""
        ...


class Deadlines:
    """Holds the deadlines of one system."""

    __slots__ = ("_heap", "_limit", "_lot", "_next_s", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry]] = []
        self._limit = _SMALL
        self._number = count()
        self._next_s = math.inf
        self._lot = ParkingLot()

    def add(self, at_s: float, entry: Entry) -> None:
        """Calls `entry.expire` at a time of Trio's clock, unless it is over by then."""
        heap = self._heap
        if len(heap) >= self._limit:
            heap[:] = [known for known in heap if not known[2].over()]
            heapify(heap)
            self._limit = max(_SMALL, 2 * len(heap))
        heappush(heap, (at_s, next(self._number), entry))
        if at_s < self._next_s:
            self._next_s = at_s
            self._lot.unpark_all()

    async def watch(self) -> None:
        """Expires entries, until cancelled."""
        heap = self._heap
        while True:
            self._next_s = heap[0][0] if heap else math.inf
            with trio.CancelScope(deadline=self._next_s) as nap:
                await self._lot.park()
            if nap.cancelled_caught:
                now_s = trio.current_time()
                while heap and (heap[0][0] <= now_s or heap[0][2].over()):
                    heappop(heap)[2].expire()
