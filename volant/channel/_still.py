"""A port at which nobody moves for a while.

A machine that is copied stands still, and its memory and its devices are read one after the other. virtio-serial writes
to the guest's memory whenever something happens at the host's end of the port, whether or not the machine stands still:
when bytes come, when there is room again for bytes that it has, when somebody connects or leaves. What came between the
two would be in one and not in the other. So nobody writes, reads, connects or closes meanwhile. Who wanted to just
waits, and knows nothing of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

T = TypeVar("T")


class Stillness:
    """Whether anything may happen at the port."""

    def __init__(self) -> None:
        self._turn = trio.Lock()
        self._over: trio.Event | None = None
        self._moves: set[trio.CancelScope] = set()
        self._moved = trio.Event()

    @asynccontextmanager
    async def keep(self) -> AsyncIterator[None]:
        """A block in which nothing happens. Bounded by the caller."""
        async with self._turn:
            over = self._over = trio.Event()
            try:
                for move in self._moves:
                    move.cancel()
                while self._moves:
                    self._moved = trio.Event()
                    await self._moved.wait()
                yield
            finally:
                self._over = None
                over.set()

    async def end(self) -> None:
        """Return once something may happen."""
        while self._over is not None:
            await self._over.wait()

    async def move(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Do something at the port. Begun again where stillness came before it was done: it must have done nothing when
        it is cancelled."""
        while True:
            await self.end()
            with trio.CancelScope() as scope:
                self._moves.add(scope)
                try:
                    return await operation()
                finally:
                    self._moves.remove(scope)
                    self._moved.set()


class Port(trio.abc.Stream):
    """A connection to the port that heeds the stillness. Closing it does not: see `Stillness.end`."""

    def __init__(self, stream: trio.abc.Stream, stillness: Stillness) -> None:
        self._stream = stream
        self._stillness = stillness

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[await self._stillness.move(partial(self._send_some, rest)) :]

    async def _send_some(self, data: memoryview) -> int:
        if isinstance(self._stream, trio.SocketStream):
            try:
                # Cancelled, it has sent nothing; `send_all` does not tell how much it has.
                return await self._stream.socket.send(data)
            except OSError as error:
                raise trio.BrokenResourceError(f"the connection broke: {error}") from error
        await self._stream.send_all(data)
        return len(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stillness.move(partial(self._stream.receive_some, max_bytes))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()
