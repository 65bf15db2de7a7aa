"""Unix sockets of a simulated machine: pairs of streams in memory, and names in its file system."""

from __future__ import annotations

import errno
import os
from collections import deque

import trio
import trio.testing


class SimListener(trio.abc.Listener[trio.abc.Stream]):
    """Listens at a path. Connections wait in a queue until `accept`, as in the kernel."""

    def __init__(self) -> None:
        self._waiting: deque[trio.abc.Stream] = deque()
        self._came = trio.Event()
        self._closed = False

    @property
    def socket(self) -> SimListener:
        """Stands for the socket of a `trio.SocketListener`, which the daemon only closes."""
        return self

    def connect(self) -> trio.abc.Stream:
        """Returns the client's end of a new connection. :raises ConnectionRefusedError: the listener is closed."""
        if self._closed:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        client, server = trio.testing.memory_stream_pair()
        self._waiting.append(server)
        self._came.set()
        return client

    async def accept(self) -> trio.abc.Stream:
        """Returns the server's end of the next connection. :raises trio.ClosedResourceError: the listener is closed."""
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self._closed:
                raise trio.ClosedResourceError
            self._came = trio.Event()
            await self._came.wait()
        return self._waiting.popleft()

    def close(self) -> None:
        """Refuses new connections, and closes those in the queue."""
        self._closed = True
        self._came.set()
        while self._waiting:
            hang_up(self._waiting.popleft())

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


def hang_up(stream: trio.abc.Stream) -> None:
    """Closes an end of a connection at once, also outside of a task."""
    assert isinstance(stream, trio.StapledStream)
    for half in (stream.send_stream, stream.receive_stream):
        assert isinstance(half, trio.testing.MemorySendStream | trio.testing.MemoryReceiveStream)
        half.close()
