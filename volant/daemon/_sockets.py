"""The sockets that clients connect to. They are bound before the tree begins and outlive every child of it."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._settings import Settings, parse_address, split

_BACKLOG = 256


class ListenError(Exception):
    """An address that the daemon can't listen on."""


@contextmanager
def listening(settings: Settings) -> Iterator[list[socket.socket]]:
    """One bound socket an address; closed, and their paths removed, at the end. :raises ListenError:"""
    sockets: list[socket.socket] = []
    paths: list[Path] = []
    try:
        for address in split(settings.api_listen_addr):
            try:
                if address.startswith("unix:"):
                    path = Path(address.removeprefix("unix:"))
                    sockets.append(_bind_unix(path))
                    paths.append(path)
                else:
                    sockets += _bind_tcp(*parse_address(address))
            except OSError as error:
                raise ListenError(
                    f"can't listen on {address}: {error.strerror or error}; is another daemon there already?"
                ) from None
        yield sockets
    finally:
        for sock in sockets:
            sock.close()
        for path in paths:
            path.unlink(missing_ok=True)


def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    sockets = []
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind(address)
        except OSError:
            sock.close()
            raise
        sock.listen(_BACKLOG)
        sockets.append(sock)
        if port == 0:
            # A free port is free in one family; asking for it twice would give two.
            break
    return sockets


def _bind_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        before = os.umask(0o117)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _clear(path: Path) -> None:
    """Remove what a killed daemon left at `path`; a socket that somebody answers on is not ours to take."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(None, "there is something at that path that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileExistsError(None, "somebody listens there")


def address_of(sock: socket.socket) -> str:
    """As clients write it: `http://127.0.0.1:7777`, or `unix:/path`."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"
