"""Waits that end when the daemon stops. So a stream ends between two writes, never in the middle of one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from volant.concurrency import open_helpers

from ._ending import Stopping

T = TypeVar("T")


class Waits:
    """Runs waits that end when the daemon stops; made by `interruptible`."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._scope: trio.CancelScope | None = None

    def stopped(self) -> bool:
        """Whether the daemon stops."""
        return self._stopping.is_set()

    async def until(self, wait: Callable[[], Awaitable[T]], deadline: float = float("inf")) -> T | None:
        """Returns the result of `wait`; None: the daemon stops first, or `deadline` (on Trio's clock) has passed."""
        if self.stopped():
            return None
        with trio.CancelScope(deadline=deadline) as scope:
            self._scope = scope
            return await wait()
        return None

    async def interrupt(self) -> None:
        """Interrupts the wait under way when the daemon stops."""
        await self._stopping.wait()
        if self._scope is not None:
            self._scope.cancel()


@asynccontextmanager
async def interruptible(stopping: Stopping) -> AsyncIterator[Waits]:
    """Returns, for the length of a block, waits that end when `stopping` is set. Exceptions of the block are not put
    into a group."""
    waits = Waits(stopping)
    async with open_helpers() as helpers:
        helpers.start_soon(waits.interrupt)
        yield waits
