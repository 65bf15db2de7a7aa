"""A guest for the channel's tests: the agent's real multiplexer in a thread, behind a port that behaves as QEMU's."""

from __future__ import annotations

import hashlib
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from volant.guest import _mux

Handler = Callable[[socket.socket], None]


class _Stop(Exception):
    pass


class _StoppableMux(_mux._Mux):
    stopped = False

    def turn(self) -> bool:
        if self.stopped:
            raise _Stop
        return super().turn()


class GuestAgent:
    """One life of the agent: its multiplexer, and a thread a stream that runs `handler`."""

    def __init__(self, port: Port, handler: Handler) -> None:
        self._sock = port.guest_end()
        self._handler = handler
        self._threads: list[threading.Thread] = []
        self._mux = _StoppableMux(self._sock.fileno(), self._serve)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._mux.loop()
        except _Stop:
            pass
        except BaseException as error:
            self.error = error

    def _serve(self, sock: socket.socket) -> None:
        def run() -> None:
            with sock:
                try:
                    self._handler(sock)
                except OSError:
                    pass  # the host has left

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    async def idle(self) -> None:
        """Wait until it has no stream."""
        while self._mux.by_id:  # noqa: ASYNC110 - another thread's, and nothing tells
            await trio.sleep(0.01)

    def stop(self) -> None:
        """Die as a killed process does: the port's end is closed, whatever was under way."""
        self._mux.stopped = True
        self._sock.shutdown(socket.SHUT_RD)  # wakes the loop
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._sock.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        if self.error is not None:
            raise self.error


class Port:
    """A virtio-serial port: a Unix socket outside for one client at a time, a descriptor inside.

    Bytes that left the client before it died still reach the guest; what the guest says while nobody is there is lost;
    and the guest is told of neither, which is the worst that the real one does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients = 0
        self._outer = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        self._inner: trio.SocketStream | None = None
        self._guest: socket.socket | None = None
        self._client: trio.SocketStream | None = None
        self._to_guest: int | None = None
        self._to_host: int | None = None

    def guest_end(self) -> socket.socket:
        """Open the port anew, as an agent that begins does."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        previous, self._inner = self._inner, trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        if previous is not None:
            previous.socket.close()
        self._changed.set()
        return theirs

    def cut_after(self, *, to_guest: int | None = None, to_host: int | None = None) -> None:
        """Kill the client once so many more bytes have passed."""
        self._to_guest, self._to_host = to_guest, to_host

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Port]:
        self._changed = trio.Event()
        await self._outer.bind(str(self.path))
        self._outer.listen(4)
        with self._outer:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept)
                nursery.start_soon(self._from_guest)
                try:
                    yield self
                finally:
                    nursery.cancel_scope.cancel()
        if self._inner is not None:
            self._inner.socket.close()

    async def _accept(self) -> None:
        while True:
            sock, _ = await self._outer.accept()
            self.clients += 1
            self._client = trio.SocketStream(sock)
            async with self._client:
                await self._from_client(self._client)
            self._client = None

    async def _from_client(self, client: trio.SocketStream) -> None:
        while True:
            try:
                data = await client.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            die = False
            if self._to_guest is not None:
                die = len(data) >= self._to_guest
                data = data[: self._to_guest]
                self._to_guest = None if die else self._to_guest - len(data)
            while self._inner is None:
                await self._changed.wait()
            inner = self._inner
            try:
                await inner.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            if die:
                return

    async def _from_guest(self) -> None:
        while True:
            while self._inner is None:
                await self._changed.wait()
            inner = self._inner
            try:
                data = await inner.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                while self._inner is inner:
                    self._changed = trio.Event()
                    await self._changed.wait()
                continue
            client = self._client
            if client is None:
                continue
            die = False
            if self._to_host is not None:
                die = len(data) >= self._to_host
                data = data[: self._to_host]
                self._to_host = None if die else self._to_host - len(data)
            try:
                await client.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                continue
            if die:
                await client.aclose()


def handle(sock: socket.socket) -> None:
    """What the tests' guest does with a stream: its first line says what."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            return
        line += byte
    match line.split():
        case [b"echo"]:
            while data := sock.recv(65536):
                sock.sendall(data)
        case [b"source", count]:
            left = int(count)
            while left:
                left -= sock.send(bytes(min(left, 65536)))
        case [b"hash"]:
            digest = hashlib.sha256()
            while data := sock.recv(65536):
                digest.update(data)
            sock.sendall(digest.hexdigest().encode())
        case [b"hold"]:
            # Reads nothing and says nothing until the host has left.
            poller = select.poll()
            poller.register(sock, 0)
            poller.poll(30_000)
