"""Waits that the daemon's stop interrupts: a stream stops between two writes, never in the middle of one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from volant.concurrency import open_helpers

T = TypeVar("T")


class Waits:
    """`interruptible` makes it."""

    def __init__(self, stopping: trio.Event) -> None:
        self._stopping = stopping
        self._scope: trio.CancelScope | None = None

    def stopped(self) -> bool:
        """Whether the daemon stops."""
        return self._stopping.is_set()

    async def until(self, wait: Callable[[], Awaitable[T]], deadline: float = float("inf")) -> T | None:
        """What `wait` gives, or None when the stop or `deadline` (on Trio's clock) comes first."""
        if self.stopped():
            return None
        with trio.CancelScope(deadline=deadline) as scope:
            self._scope = scope
            return await wait()
        return None

    async def hear(self) -> None:
        """Interrupt the wait under way when the stop comes."""
        await self._stopping.wait()
        if self._scope is not None:
            self._scope.cancel()


@asynccontextmanager
async def interruptible(stopping: trio.Event) -> AsyncIterator[Waits]:
    """For the length of a block, waits that end when `stopping` is set. What the block raises leaves as it is."""
    waits = Waits(stopping)
    async with open_helpers() as helpers:
        helpers.start_soon(waits.hear)
        yield waits
