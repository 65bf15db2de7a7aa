"""Ends requests early, when the daemon stops or the credentials of a request become invalid.

Both end a request in the same way. Streams check `Ending` between two writes, and close in the way of their protocol. A
request whose credentials ended, and that is still running after `GRACE_S`, is cancelled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import trio

from volant.concurrency import open_helpers
from volant.model import Caller, Problem

T = TypeVar("T")


class Waits:
    """Runs waits that end when the daemon stops; created by `interruptible`."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._scope: trio.CancelScope | None = None

    def stopped(self) -> bool:
        """Returns whether the daemon is stopping."""
        return self._stopping.is_set()

    async def until(self, wait: Callable[[], Awaitable[T]], deadline: float = float("inf")) -> T | None:
        """Returns the result of `wait`; None if the daemon stops first, or `deadline` (on Trio's clock) passes."""
        if self.stopped():
            return None
        with trio.CancelScope(deadline=deadline) as scope:
            self._scope = scope
            return await wait()
        return None

    async def interrupt(self) -> None:
        """Interrupts the current wait when the daemon stops."""
        await self._stopping.wait()
        if self._scope is not None:
            self._scope.cancel()


@asynccontextmanager
async def interruptible(stopping: Stopping) -> AsyncIterator[Waits]:
    """Yields waits that end when `stopping` is set. Exceptions of the block are not put into a group."""
    waits = Waits(stopping)
    async with open_helpers() as helpers:
        helpers.start_soon(waits.interrupt)
        yield waits


GOING_AWAY = 1001
UNAUTHORIZED = 4401
"""The close code of a WebSocket whose credentials have become invalid."""
GRACE_S = 1.0
"""How long a stream may take to close after its credentials have ended."""


class Stopping(Protocol):
    """An event that interrupts waits, such as the stop of the daemon."""

    def is_set(self) -> bool: ...

    async def wait(self) -> None: ...


class Ending:
    """The event that ends one request: its credentials have ended, or the daemon stops. The request runs for the length
    of a `with` block."""

    def __init__(self, caller: Caller, stopping: Stopping, running: set[Ending]) -> None:
        self.caller = caller
        self.reason: str | None = None
        """Why its credentials are not valid any more; None if they are valid."""
        self.scope = trio.CancelScope()
        self._stopping = stopping
        self._running = running
        self._ended = trio.Event()

    def __enter__(self) -> Ending:
        self._running.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._running.discard(self)

    def is_set(self) -> bool:
        """Returns whether the request must end."""
        return self._ended.is_set() or self._stopping.is_set()

    async def wait(self) -> None:
        """Waits until the request must end."""
        if self.is_set():
            await trio.lowlevel.checkpoint()
        else:
            await self._ended.wait()

    def wake(self) -> None:
        """Ends the waits when the daemon stops."""
        self._ended.set()

    def end(self, reason: str) -> None:
        """Ends the request, because its credentials have become invalid."""
        if self.reason is None:
            self.reason = reason
            self.scope.deadline = trio.current_time() + GRACE_S
            self._ended.set()

    @property
    def closing(self) -> tuple[int, str]:
        """The close code and reason for a WebSocket."""
        return (GOING_AWAY, "the daemon stops") if self.reason is None else (UNAUTHORIZED, self.reason)

    def problem(
        self, detail: str = "the daemon stops", *, hint: str = "try again when it is back", vm: str | None = None
    ) -> Problem:
        """Returns the problem for a request that ends without an answer: 401 if its credentials ended, otherwise
        503."""
        if self.reason is not None:
            return Problem(401, "credentials-ended", self.reason, hint="use another key, or sign in again")
        return Problem(503, "daemon-stopping", detail, hint=hint, vm=vm)


class Running:
    """The running requests."""

    def __init__(self) -> None:
        self._endings: set[Ending] = set()

    def add(self, caller: Caller, stopping: Stopping) -> Ending:
        """Returns the ending of a request, which runs for the length of a `with` block."""
        return Ending(caller, stopping, self._endings)

    async def stop_with(self, stopping: Stopping) -> None:
        """Ends the waits of all requests when the daemon stops, with one task for all of them."""
        await stopping.wait()
        for ending in self._endings:
            ending.wake()

    def recheck(self, ended: Callable[[Caller], str | None]) -> None:
        """Ends the requests of callers whose credentials have ended.

        :param ended: returns why the credentials of a caller are not valid any more, None if they are valid
        """
        for ending in list(self._endings):
            reason = ended(ending.caller)
            if reason is not None:
                ending.end(reason)
