"""A port of the guest whose host's end can be held, which stops all sending, receiving, connecting and closing there.

While a paused machine is copied, QEMU reads its memory and its devices one after the other. virtio-serial writes to the
guest's memory on every event at the host's end of the port, even while the machine is paused: bytes arrive, there is
room for bytes again, a host connects or disconnects. An event in between would be in only one of the two. So tasks that
want to use the port wait until the hold ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

T = TypeVar("T")


class PortHold:
    """Whether the port may be used."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._released: trio.Event | None = None
        self._running: set[trio.CancelScope] = set()
        self._left = trio.Event()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Keeps the port unused during the block. The caller sets the deadline."""
        async with self._lock:
            released = self._released = trio.Event()
            try:
                for scope in self._running:
                    scope.cancel()
                while self._running:
                    self._left = trio.Event()
                    await self._left.wait()
                yield
            finally:
                self._released = None
                released.set()

    async def wait_released(self) -> None:
        """Waits until the port may be used."""
        while self._released is not None:
            await self._released.wait()

    async def run(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of an operation on the port. A hold cancels it, and it runs again afterwards, so a
        cancelled operation must have had no effect."""
        while True:
            await self.wait_released()
            with trio.CancelScope() as scope:
                self._running.add(scope)
                try:
                    return await operation()
                finally:
                    self._running.remove(scope)
                    self._left.set()


class HoldablePort(trio.abc.Stream):
    """A connection to the port. Sending and receiving wait for the end of a hold, but closing does not, see
    `PortHold.wait_released`."""

    def __init__(self, stream: trio.abc.Stream, hold: PortHold) -> None:
        self._stream = stream
        self._hold = hold

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[await self._hold.run(partial(self._send_some, rest)) :]

    async def _send_some(self, data: memoryview) -> int:
        if isinstance(self._stream, trio.SocketStream):
            try:
                # A cancelled `send` has sent nothing; of a cancelled `send_all` nobody knows how much.
                return await self._stream.socket.send(data)
            except OSError as error:
                raise trio.BrokenResourceError(f"the connection broke: {error}") from error
        await self._stream.send_all(data)
        return len(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._hold.run(partial(self._stream.receive_some, max_bytes))

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()
