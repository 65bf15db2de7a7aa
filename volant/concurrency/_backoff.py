"""Pauses between tries that grow."""

from __future__ import annotations

import trio


class Backoff:
    """Pauses between tries. Each is twice as long as the one before, up to a limit."""

    def __init__(self, first_s: float, max_s: float, *, steady_s: float | None = None) -> None:
        """`steady_s`: a try that lasts so long has worked, and the pauses start over. None: `reset` alone does that."""
        self._first_s = self._next_s = first_s
        self._max_s = max_s
        self._steady_s = steady_s
        self._try_began = trio.current_time()

    @property
    def next_s(self) -> float:
        """The length of the next pause."""
        if self._steady_s is not None and trio.current_time() - self._try_began >= self._steady_s:
            self.reset()
        return self._next_s

    def reset(self) -> None:
        """Starts over with the first pause."""
        self._next_s = self._first_s

    async def pause(self) -> None:
        """Sleeps before the next try."""
        pause_s = self.next_s
        self._next_s = min(2 * pause_s, self._max_s)
        await trio.sleep(pause_s)
        self._try_began = trio.current_time()
