"""The facet for sockets and tap devices."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import trio

TUN = Path("/dev/net/tun")
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def open_or_create_tap(name: str) -> int:
    """Returns a descriptor of a tap that no other process has open. Creates the tap if it does not exist.

    A tap created here is removed with its last descriptor, unless `make_permanent` was called.

    :raises OSError: `EBUSY` if another process has it open, `EINVAL` if the interface is not a tap.
    """
    tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except OSError:
        os.close(tun)
        raise
    return tun


def make_permanent(tun: int, user: int) -> None:
    """Lets a tap outlive its descriptors. Only `user` and root may open it. Raises OSError."""
    fcntl.ioctl(tun, _TUNSETOWNER, user)
    fcntl.ioctl(tun, _TUNSETPERSIST, 1)


_FULL_S = 0.005
"""The delay between two attempts to connect to a socket whose queue is full."""


class Sockets(Protocol):
    async def connect_unix(self, path: Path, timeout_s: float) -> trio.SocketStream:
        """Connects to a Unix stream socket. The path may exceed the kernel's limit of 108 bytes.

        Raises OSError if nothing listens, trio.TooSlowError after `timeout_s`.
        """

    async def open_unix(self, path: Path, timeout_s: float) -> AbstractContextManager[int]:
        """Connects to a Unix stream socket, and yields the descriptor, which is closed at the end of the block. Raises
        the errors of `connect_unix`."""

    def listen_unix(self, path: Path, *, mode: int = 0o600, backlog: int = 16) -> trio.SocketListener:
        """Listens on a Unix stream socket, in place of an existing file. The path may exceed the kernel's limit of 108
        bytes; the file stays when the listener is closed. Raises OSError."""

    def listen_for(self, path: Path) -> AbstractContextManager[int]:
        """Listens on a Unix stream socket for a process that is started in the block and inherits the descriptor. The
        socket then lives as long as that process. Raises OSError."""

    def unread(self, stream: trio.SocketStream) -> tuple[int, int]:
        """Returns how many bytes of a Unix stream the peer has not read yet, and how many this end has not read. The
        first number includes the kernel's overhead, so it only shows whether there are any, or a change. Raises
        OSError."""

    async def connect_vsock(self, cid: int, port: int, timeout_s: float) -> trio.SocketStream:
        """Connects to a port of a guest over vsock. Raises OSError, trio.TooSlowError."""

    def open_tap(self, name: str) -> AbstractContextManager[int]:
        """Opens an existing tap device that no process has open, for the block. Raises OSError."""


class LinuxSockets(Sockets):
    async def connect_unix(self, path: Path, timeout_s: float) -> trio.SocketStream:
        with _short_path(path) as address, _closed_on_error(socket.socket(socket.AF_UNIX)) as sock:
            sock.setblocking(False)
            with trio.fail_after(timeout_s):
                while True:
                    await trio.lowlevel.checkpoint()
                    try:
                        sock.connect(address)
                        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
                    except BlockingIOError:
                        # The queue is full, and the kernel does not report when it has room. Trio 0.35 takes such a
                        # socket for a connected one.
                        await trio.sleep(_FULL_S)

    async def open_unix(self, path: Path, timeout_s: float) -> AbstractContextManager[int]:
        stream = await self.connect_unix(path, timeout_s)

        @contextmanager
        def block() -> Iterator[int]:
            with stream.socket as sock:
                yield sock.fileno()

        return block()

    def listen_unix(self, path: Path, *, mode: int = 0o600, backlog: int = 16) -> trio.SocketListener:
        with _short_path(path) as address, _closed_on_error(socket.socket(socket.AF_UNIX)) as sock:
            path.unlink(missing_ok=True)
            # bind creates the file with the socket's mode, so that it never has another one.
            os.fchmod(sock.fileno(), mode)
            sock.bind(address)
            sock.listen(backlog)
            return trio.SocketListener(trio.socket.from_stdlib_socket(sock))

    @contextmanager
    def listen_for(self, path: Path) -> Iterator[int]:
        with self.listen_unix(path).socket as sock:
            yield sock.fileno()

    def unread(self, stream: trio.SocketStream) -> tuple[int, int]:
        queues = []
        for request in (termios.TIOCOUTQ, termios.FIONREAD):
            answer = fcntl.ioctl(stream.socket.fileno(), request, bytes(4))
            queues.append(int.from_bytes(answer, sys.byteorder))
        return queues[0], queues[1]

    async def connect_vsock(self, cid: int, port: int, timeout_s: float) -> trio.SocketStream:
        sock = trio.socket.socket(trio.socket.AF_VSOCK, trio.socket.SOCK_STREAM)
        try:
            with trio.fail_after(timeout_s):
                await sock.connect((cid, port))
            return trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise

    @contextmanager
    def open_tap(self, name: str) -> Iterator[int]:
        socket.if_nametoindex(name)  # a missing one would be created
        tap = open_or_create_tap(name)
        try:
            yield tap
        finally:
            os.close(tap)


@contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """Yields a short name of a path that fits into the address of a Unix socket, for the block."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[socket.socket]:
    try:
        yield sock
    except BaseException:
        sock.close()
        raise
