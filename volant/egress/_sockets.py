"""The resolvers' interface to the operating system: a narrow protocol, so that a simulated host needs no sockets."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import closing
from ipaddress import ip_address
from typing import Protocol, TypeVar

import trio

from volant.network import NetworkFailed

T = TypeVar("T")

Sender = tuple[str, int]

_IP_FREEBIND = 15
_BIND_TRIES = 10
_BACKLOG = 8
_RECEIVE_BYTES = 64 * 1024
"""The kernel's buffer of one resolver. Data that does not fit is dropped, and guests retry."""
_MAX_UDP = 4096
_MAX_TCP = 16 * 1024
"""Maximum size of a TCP answer: a hundred addresses take 2 KiB."""


class DnsListener(Protocol):
    """The sockets of one resolver, of one port of UDP and TCP."""

    port: int

    async def receive(self) -> tuple[bytes, Sender]:
        """Returns the next datagram. :raises OSError: the system refuses."""
        ...

    async def send(self, data: bytes, to: Sender) -> None:
        """Sends a datagram. If it can't be sent, it is lost."""
        ...

    async def accept(self) -> tuple[trio.abc.Stream, Sender]:
        """Returns the next connection. :raises OSError: there are no descriptors left."""
        ...

    def close(self) -> None:
        """Closes both."""
        ...


class DnsSockets(Protocol):
    """The operating system's sockets for DNS."""

    async def listen(self, address: str) -> DnsListener:
        """Listens at an address of this host, which may not exist yet. :raises NetworkFailed:"""
        ...

    async def ask(self, server: str, question: bytes, accept: Callable[[bytes], T | None], *, tcp: bool = False) -> T:
        """Sends a question to a DNS server, and returns the result of `accept` for the first message that it accepts.
        The caller sets the deadline.

        :param accept: returns None for a message to ignore
        :raises OSError: the server can't be reached, or closes the connection.
        """
        ...


class HostDns:
    """The sockets of this host; see `DnsSockets`."""

    async def listen(self, address: str) -> DnsListener:
        await trio.lowlevel.checkpoint()
        try:
            return _listen(address)
        except OSError as error:
            raise NetworkFailed("egress", f"the VM's resolver can't listen at {address}: {error}") from error

    async def ask(self, server: str, question: bytes, accept: Callable[[bytes], T | None], *, tcp: bool = False) -> T:
        family = socket.AF_INET if ip_address(server).version == 4 else socket.AF_INET6
        kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
        with closing(trio.socket.socket(family, kind | socket.SOCK_CLOEXEC)) as sock:
            # Connected, so the kernel takes nothing of anybody else. Its port is random.
            await sock.connect((server, 53))
            if tcp:
                return await _ask_tcp(trio.SocketStream(sock), question, accept)
            await sock.send(question)
            while True:
                found = accept(await sock.recv(_MAX_UDP))
                if found is not None:
                    return found


async def _ask_tcp(stream: trio.SocketStream, question: bytes, accept: Callable[[bytes], T | None]) -> T:
    await stream.send_all(len(question).to_bytes(2) + question)
    length = int.from_bytes(await read_exactly(stream, 2))
    if length > _MAX_TCP:
        raise OSError(errno.EMSGSIZE, f"the answer has {length} bytes")
    found = accept(await read_exactly(stream, length))
    if found is None:
        raise OSError(errno.EBADMSG, "the answer is to another question")
    return found


async def read_exactly(stream: trio.abc.Stream, size: int) -> bytes:
    """Returns the next bytes. :raises ConnectionResetError: there are fewer."""
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            raise OSError(errno.ECONNRESET, "the connection ended early")
        data += piece
    return data


def _listen(address: str) -> DnsListener:
    for _ in range(_BIND_TRIES):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            for sock in (udp, tcp):
                # The bridge may not have its address yet.
                sock.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            udp.bind((address, 0))
            tcp.bind(udp.getsockname())
            tcp.listen(_BACKLOG)
        except OSError as error:
            udp.close()
            tcp.close()
            if error.errno == errno.EADDRINUSE:
                # Something has the port for TCP alone.
                continue
            raise
        return _Listener(udp, tcp)
    raise OSError(errno.EADDRINUSE, "no port is free for both UDP and TCP")


class _Listener:
    def __init__(self, udp: socket.socket, tcp: socket.socket) -> None:
        self.port: int = udp.getsockname()[1]
        self._udp = trio.socket.from_stdlib_socket(udp)
        self._tcp = trio.SocketListener(trio.socket.from_stdlib_socket(tcp))

    async def receive(self) -> tuple[bytes, Sender]:
        data, sender = await self._udp.recvfrom(_MAX_UDP)
        return data, sender

    async def send(self, data: bytes, to: Sender) -> None:
        try:
            await self._udp.sendto(data, to)
        except OSError:
            pass  # As if the network had lost it.

    async def accept(self) -> tuple[trio.abc.Stream, Sender]:
        while True:
            stream = await self._tcp.accept()
            try:
                return stream, stream.socket.getpeername()
            except OSError:
                # The guest has left already.
                await trio.aclose_forcefully(stream)

    def close(self) -> None:
        self._udp.close()
        self._tcp.socket.close()
