"""Deadlines of asks and starts, and timers: all of one system in one heap, watched by one task.

A cancel scope round every ask would cost nearly as much as the ask itself, and almost none of them ever fires. Here a
deadline is one entry in a heap; that its ask has been answered, or its timer cancelled, is noticed when the entry comes
up, or when the heap has doubled since it was last cleared of such. The watching task sleeps until the earliest entry,
also if that has lost its meaning meanwhile: else it would have to be woken for the next. So it is woken only by one
that is earlier still, which is rare, since most deadlines of a program are about as long as each other.
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
    """What has a deadline."""

    def over(self) -> bool:
        """Whether the deadline has lost its meaning."""
        ...

    def expire(self) -> None:
        """It has come. Does nothing when it has lost its meaning."""
        ...


class Deadlines:
    """The deadlines of one system."""

    __slots__ = ("_heap", "_limit", "_lot", "_next_s", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry]] = []
        self._limit = _SMALL
        self._number = count()
        self._next_s = math.inf
        self._lot = ParkingLot()

    def add(self, at_s: float, entry: Entry) -> None:
        """Lets `entry` expire at a time of Trio's clock, unless it is over by then."""
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
        """Runs for as long as the system does."""
        heap = self._heap
        while True:
            self._next_s = heap[0][0] if heap else math.inf
            with trio.CancelScope(deadline=self._next_s) as nap:
                await self._lot.park()
            if nap.cancelled_caught:
                now_s = trio.current_time()
                while heap and (heap[0][0] <= now_s or heap[0][2].over()):
                    heappop(heap)[2].expire()
