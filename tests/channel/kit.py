"""Guests for the channel's tests, behind a virtio-serial port that behaves as QEMU's, or behind a vsock.

`way.begin(handler)` is an agent of the tests: on the port with the real multiplexer, and a thread a stream that runs
`handler`. `way.begin_real()` is the agent itself, in a process of its own.
"""

from __future__ import annotations

import errno
import hashlib
import select
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import trio

from tests.threaded_server import serve_in_threads
from volant.channel import Address, VirtioSerial, Vsock
from volant.guest import _mux
from volant.host import Host
from volant.host._sockets import LinuxSockets
from volant.model.agent import AGENT_PORT

Handler = Callable[[socket.socket], None]
BACKLOG = 128
"""The backlog of the agent's vsock."""


class Agent(ABC):
    """A running test agent."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._threads: list[threading.Thread] = []

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

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    @abstractmethod
    async def idle(self) -> None:
        """Waits until it has no stream."""

    @abstractmethod
    def stop(self) -> None:
        """Ends it as SIGKILL would. May be called again."""


class Way(ABC):
    """A transport into a guest: the hypervisor's side on the host, with or without an agent."""

    address: Address
    host: Host
    """What connects to it."""

    @abstractmethod
    def begin(self, handler: Handler) -> Agent:
        """Starts a test agent."""

    @abstractmethod
    def begin_real(self) -> subprocess.Popen[bytes]:
        """Starts the real agent; the caller ends it."""


def _agent_process(how: str, end: socket.socket) -> subprocess.Popen[bytes]:
    with end:
        command = [sys.executable, "-m", "tests.channel.agent_process", how, str(end.fileno())]
        return subprocess.Popen(command, pass_fds=[end.fileno()], start_new_session=True)


class _Stop(Exception):
    pass


class _StoppableMux(_mux._Mux):
    stopped = False

    def turn(self) -> bool:
        if self.stopped:
            raise _Stop
        return super().turn()


class GuestAgent(Agent):
    """On the port, with the real multiplexer."""

    def __init__(self, port: Port, handler: Handler) -> None:
        super().__init__(handler)
        self._sock = port.guest_end()
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

    async def idle(self) -> None:
        while self._mux.by_id:  # noqa: ASYNC110 - another thread's, and nothing tells
            await trio.sleep(0.01)

    def stop(self) -> None:
        if self._mux.stopped:
            return
        self._mux.stopped = True
        self._sock.shutdown(socket.SHUT_RD)  # wakes the loop
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._sock.close()
        self._join()
        if self.error is not None:
            raise self.error


class Port(Way):
    """A virtio-serial port: a Unix socket on the host for one client at a time, a descriptor in the guest.

    Bytes that left the client before it died still reach the guest; what the guest says while nobody is there is lost;
    and the guest is told of neither, which is the worst that the real one does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = VirtioSerial(path)
        self.host = Host()
        self.clients = 0
        self._outer = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        self._inner: trio.SocketStream | None = None
        self._guest: socket.socket | None = None
        self._client: trio.SocketStream | None = None
        self._to_guest: int | None = None
        self._to_host: int | None = None

    def begin(self, handler: Handler) -> Agent:
        return GuestAgent(self, handler)

    def begin_real(self) -> subprocess.Popen[bytes]:
        return _agent_process("serial", self.guest_end())

    def guest_end(self) -> socket.socket:
        """Opens the port again, as an agent that starts does."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        previous, self._inner = self._inner, trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        if previous is not None:
            previous.socket.close()
        self._changed.set()
        return theirs

    def cut_after(self, *, to_guest: int | None = None, to_host: int | None = None) -> None:
        """Disconnects the client after so many more bytes."""
        self._to_guest, self._to_host = to_guest, to_host

    def cut(self) -> None:
        """Disconnects the client, as the end of the hypervisor does."""
        if self._client is not None:
            self._client.socket.close()

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
            data, self._to_guest, die = _until(self._to_guest, data)
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
            data, self._to_host, die = _until(self._to_host, data)
            try:
                await client.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                continue
            if die:
                await client.aclose()


def _until(left: int | None, data: bytes) -> tuple[bytes, int | None, bool]:
    """Returns what may pass of `data` when `left` bytes may (None: all), how many may then, and whether this was the
    end."""
    if left is None:
        return data, None, False
    if len(data) >= left:
        return data[:left], None, True
    return data, left - len(data), False


class VsockHost(Host):
    """A host whose vsock is a Unix socket: a connection begins with the port that it is for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sockets = _UnixVsock(path)


class _UnixVsock(LinuxSockets):
    def __init__(self, path: Path) -> None:
        self._path = path

    async def connect_vsock(self, cid: int, port: int, timeout_s: float) -> trio.SocketStream:
        del cid
        with trio.fail_after(timeout_s):
            stream = await self.connect_unix(self._path, timeout_s)
            try:
                await stream.send_all(b"%d\n" % port)
                if await stream.receive_some(1) != b"+":
                    raise ConnectionRefusedError(errno.ECONNREFUSED, f"the guest refused port {port}")
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            return stream


class Hypervisor(Way):
    """Maps connections on a Unix socket to the guest's vsock; see `VsockHost`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = Vsock(3)
        self.host = VsockHost(path)
        self.take: Handler | None = None
        """Takes connections to the agent's port; None: they are refused."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._closing = ExitStack()

    def begin(self, handler: Handler) -> Agent:
        return _VsockAgent(self, handler)

    def begin_real(self) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        self._closing.enter_context(ours)
        process = _agent_process("vsock", theirs)

        def take(sock: socket.socket) -> None:
            with sock:
                socket.send_fds(ours, [b"1"], [sock.fileno()])

        self.take = take
        return process

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Hypervisor]:
        with self.listening():
            yield self

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Serves in threads for the length of a block."""
        self._listener.bind(str(self.path))
        self._listener.listen(BACKLOG)
        thread = serve_in_threads(self._listener, self._connect)
        try:
            yield
        finally:
            with self._closing, self._listener:
                self._listener.shutdown(socket.SHUT_RDWR)
                thread.join(10)

    def _connect(self, sock: socket.socket) -> None:
        try:
            line = b""
            while not line.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    raise ConnectionAbortedError
                line += byte
            take = self.take
            if line != b"%d\n" % AGENT_PORT or take is None:
                raise ConnectionRefusedError
            sock.sendall(b"+")
            take(sock)
        except OSError:
            sock.close()


class _VsockAgent(Agent):
    """An agent with connections, which close when it ends."""

    def __init__(self, hypervisor: Hypervisor, handler: Handler) -> None:
        super().__init__(handler)
        self._hypervisor = hypervisor
        self._socks: list[socket.socket] = []
        hypervisor.take = self._take

    def _take(self, sock: socket.socket) -> None:
        self._socks.append(sock)
        self._serve(sock)

    async def idle(self) -> None:
        while any(thread.is_alive() for thread in self._threads):  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.01)

    def stop(self) -> None:
        self._hypervisor.take = None
        for sock in self._socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it was over
        self._join()


WAYS: dict[str, type[Port] | type[Hypervisor]] = {"virtio-serial": Port, "vsock": Hypervisor}


@contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs an agent for the length of a block, unless the test ends it."""
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


sent = 0
"""Counts the bytes that all `source`s have sent."""


async def settled() -> None:
    """Waits until no `source` can send a byte, as all buffers are full."""
    before = -1
    while before != sent:
        before = sent
        await trio.sleep(0.1)


def handle(sock: socket.socket) -> None:
    """Serves a stream in the test guest, as its first line says."""
    global sent
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
                size = sock.send(bytes(min(left, 65536)))
                left -= size
                sent += size
        case [b"hash"]:
            digest = hashlib.sha256()
            while data := sock.recv(65536):
                digest.update(data)
            sock.sendall(digest.hexdigest().encode())
        case [b"hold"]:
            # Reads and sends nothing until the host has left.
            poller = select.poll()
            poller.register(sock, 0)
            poller.poll(30_000)
