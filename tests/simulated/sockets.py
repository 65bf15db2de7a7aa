"""The Unix sockets of the simulated machine, as one daemon sees them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import trio

from actors import fault
from volant.host import Sockets

from .calls import Calls
from .file_system import SocketName
from .listener import SimListener, hang_up


class SimSockets(Sockets):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._files = calls.machine.files
        self._listeners: list[SimListener] = []
        self._streams: list[trio.abc.Stream] = []

    def close_all(self) -> None:
        """The daemon was killed: the kernel closes what it had open."""
        for listener in self._listeners:
            listener.close()
        for stream in self._streams:
            hang_up(stream)

    async def connect_unix(self, path: Path, timeout_s: float) -> Any:
        self._calls.check()
        await trio.sleep(self._calls.rng.uniform(0.0, 0.005))
        self._calls.check()
        node = self._files.get(path)
        if not isinstance(node, SocketName) or node.listening is None or fault("socket.refuses"):
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED), str(path))
        stream = node.listening.connect()
        self._streams.append(stream)
        return stream

    async def open_unix(self, path: Path, timeout_s: float) -> AbstractContextManager[int]:
        stream = await self.connect_unix(path, timeout_s)
        self._streams.remove(stream)
        on_the_way = self._calls.machine.on_the_way

        @contextmanager
        def block() -> Iterator[int]:
            on_the_way[path.stem] = stream
            try:
                yield -1
            finally:
                # A connection that the hypervisor has taken stays open.
                if on_the_way.get(path.stem) is stream:
                    hang_up(on_the_way.pop(path.stem))

        return block()

    def listen_unix(self, path: Path, *, mode: int = 0o600, backlog: int = 16) -> Any:
        self._calls.check()
        listener = SimListener()
        if self._files.find(path) is not None:
            self._files.unlink(path)
        self._files.put(path, SocketName(listener))
        self._listeners.append(listener)
        return listener

    @contextmanager
    def listen_for(self, path: Path) -> Iterator[int]:
        listener = self.listen_unix(path)
        self._listeners.remove(listener)
        inherited = self._calls.machine.inherited
        number = max(inherited, default=0) + 1
        inherited[number] = listener
        try:
            yield number
        finally:
            # The process that has it keeps it open.
            if inherited.get(number) is listener:
                inherited.pop(number).close()

    def unread(self, stream: trio.SocketStream) -> tuple[int, int]:
        self._calls.check()
        return 0, 0

    async def connect_vsock(self, cid: int, port: int, timeout_s: float) -> trio.SocketStream:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    @contextmanager
    def open_tap(self, name: str) -> Iterator[int]:
        self._calls.check()
        yield -1
