"""Background tasks that end with a block of code, and delays between attempts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Backoff:
    """Delays between attempts. Each is twice as long as the previous one, up to a limit."""

    def __init__(self, first_s: float, max_s: float, *, steady_s: float | None = None) -> None:
        """Creates it. After an attempt of `steady_s`, which counts as a success, the delays start over. With None, only
        `reset` does that."""
        self._first_s = self._next_s = first_s
        self._max_s = max_s
        self._steady_s = steady_s
        self._try_began = trio.current_time()

    @property
    def next_s(self) -> float:
        """Returns the length of the next delay."""
        if self._steady_s is not None and trio.current_time() - self._try_began >= self._steady_s:
            self.reset()
        return self._next_s

    def reset(self) -> None:
        """Starts over with the first delay."""
        self._next_s = self._first_s

    def take(self) -> float:
        """Returns the length of the next delay, and doubles that of the one after it."""
        pause_s = self.next_s
        self._next_s = min(2 * pause_s, self._max_s)
        return pause_s

    async def pause(self) -> None:
        """Sleeps before the next attempt."""
        await trio.sleep(self.take())
        self._try_began = trio.current_time()


@asynccontextmanager
async def open_helpers() -> AsyncIterator[trio.Nursery]:
    """Opens a nursery whose tasks are cancelled when the block ends.

    An exception of the block leaves as it is; Trio alone would wrap it in a group, as any task could have raised it. An
    exception of a task cancels the block and leaves in a group.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
