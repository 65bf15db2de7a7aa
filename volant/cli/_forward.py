"""`volar vms forward`: forwards local ports on loopback to ports of a VM."""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import click
import trio

from volant.client import ClientError, TcpStream
from volant.model import Problem

from ._output import Output
from ._run import Failure
from ._streaming import Session, command
from ._text import safe
from ._vms_group import name_argument

_CONNECTIONS = 128
_PIECE = 64 * 1024
_LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_NO_IPV6 = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT})
_TRIES = 10
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Ports:
    """A local port, 0 for any free one, and a port in the guest."""

    local: int
    remote: int


class PortsType(click.ParamType[Ports]):
    """`[LOCAL:]PORT`."""

    name = "[local:]port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Ports:
        if isinstance(value, Ports):
            return value
        local, colon, remote = str(value).rpartition(":")
        numbers = [remote if not colon else local, remote]
        if not all(text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) < 65536 for text in numbers):
            self.fail(f"{value!r} is not [LOCAL:]PORT with numbers up to 65535", param, ctx)
        if int(remote) == 0:
            self.fail("a guest has no port 0; 0:PORT takes any port here", param, ctx)
        return Ports(int(numbers[0]), int(remote))


@command(None, "forward")
@name_argument
@click.argument("ports", metavar="[LOCAL:]PORT...", nargs=-1, required=True, type=PortsType())
async def forward(session: Session, name: str, ports: tuple[Ports, ...]) -> None:
    """Forward local ports to ports of a VM, until interrupted.

    PORT 8080 listens on 127.0.0.1:8080 and [::1]:8080. LOCAL:PORT listens on another port, 0:PORT on a free one. Each
    local connection opens one in the guest, at most 128 at once. Forwarding continues when the VM is restarted; while
    the VM is down, connections are reset, and standard error shows why.
    """
    vm = await session.client.vms.get(name)
    forwarder = _Forwarder(session, vm.name)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        listening: list[tuple[Ports, list[trio.SocketListener]]] = []
        for each in ports:
            listeners = await _listen(each.local)
            for listener in listeners:
                await stack.enter_async_context(listener)
            listening.append((each, listeners))
        for each, listeners in listening:
            _print_addresses(session.out, vm.name, each.remote, listeners)
            serve = partial(forwarder.serve, each.remote)
            nursery.start_soon(trio.serve_listeners, serve, listeners)


async def _listen(port: int) -> list[trio.SocketListener]:
    """Listens on the loopback of both families, on one port. :raises Failure: it is in use, or not allowed."""
    for tries_left in reversed(range(_TRIES)):
        listeners: list[trio.SocketListener] = []
        chosen = port
        for family, host in _LOOPBACKS:
            try:
                listener = await _bound(family, host, chosen)
            except OSError as error:
                if family is socket.AF_INET6 and error.errno in _NO_IPV6:
                    continue
                for other in listeners:
                    await trio.aclose_forcefully(other)
                if port == 0 and tries_left and error.errno == errno.EADDRINUSE:
                    break
                raise Failure(
                    f"can't listen on {_address(host, chosen)}: {error.strerror}",
                    hint="name another port here: LOCAL:PORT, or 0:PORT for any",
                ) from None
            listeners.append(listener)
            chosen = listener.socket.getsockname()[1]
        else:
            return listeners
    raise AssertionError("the last try returns or raises")


async def _bound(family: int, host: str, port: int) -> trio.SocketListener:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind((host, port))
        sock.listen(_CONNECTIONS)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock)


def _print_addresses(out: Output, name: str, port: int, listeners: list[trio.SocketListener]) -> None:
    addresses = [_address(*listener.socket.getsockname()[:2]) for listener in listeners]
    if out.json:
        out.item({"vm": name, "port": port, "addresses": addresses})
    else:
        out.line(f"{' and '.join(addresses)} -> port {port} of {safe(name)}")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Forwarder:
    """Serves the connections of one command."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name
        self._open = 0
        self._trouble = ""

    async def serve(self, port: int, local: trio.SocketStream) -> None:
        """Serves one connection; never raises."""
        if self._open >= _CONNECTIONS:
            self._note(f"the limit of {_CONNECTIONS} connections is reached; another one is reset")
            _reset(local)
            return
        self._open += 1
        whole = False
        try:
            async with self._session.client.vms.tcp(self._name, port) as remote:
                self._recovered(port)
                whole = await _splice(local, remote)
        except (Problem, ClientError) as error:
            self._note(f"port {port}: {error}")
        except trio.BrokenResourceError as error:
            self._note(f"port {port}: a connection broke: {error}")
        finally:
            self._open -= 1
            if not whole:
                # Reset, so that the local program does not take it for the regular end.
                _reset(local)
        await local.aclose()

    def _note(self, text: str) -> None:
        """Prints a problem once, until another one occurs or it is resolved."""
        if text != self._trouble:
            self._trouble = text
            self._session.out.note(f"volar: {text}")

    def _recovered(self, port: int) -> None:
        if self._trouble:
            self._trouble = ""
            self._session.out.note(f"volar: port {port} of {self._name} answers again")


async def _splice(local: trio.SocketStream, remote: TcpStream) -> bool:
    """Passes bytes on in both directions; returns whether both ended regularly.

    :raises trio.BrokenResourceError: the connection to the guest broke
    """
    ended = 0
    broken: trio.BrokenResourceError | None = None
    async with trio.open_nursery() as nursery:

        async def copy(source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream) -> None:
            nonlocal ended, broken
            try:
                while data := await source.receive_some(_PIECE):
                    await sink.send_all(data)
                await sink.send_eof()
                ended += 1
            except trio.BrokenResourceError as error:
                # An OSError comes from the local socket: the local program has left.
                if not isinstance(error.__cause__, OSError):
                    broken = error
                nursery.cancel_scope.cancel()

        nursery.start_soon(copy, local, remote)
        nursery.start_soon(copy, remote, local)
    if broken is not None:
        raise broken
    return ended == 2


def _reset(stream: trio.SocketStream) -> None:
    if stream.socket.fileno() >= 0:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        stream.socket.close()
