"""Binds the sockets for clients, or inherits them from systemd (sd_listen_fds(3)).

Inherited sockets outlive the daemon: a client that connects while there is none waits for the next one. They replace
the addresses in the settings.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from volant.host import UnsafeDirectory, check_way_to

from ._settings import Settings, parse_address, split

_logger = logging.getLogger("volant.daemon")

_BACKLOG = 256
_FIRST_FD = 3
_MAX_FDS = 64
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)


class ListenError(Exception):
    """The daemon can't listen on an address."""


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Returns the sockets that systemd passed, and removes them from the environment. :raises ListenError:"""
    count, pid, _ = (environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if not count or pid != str(os.getpid()):
        return []
    if not count.isdecimal() or int(count) > _MAX_FDS:
        raise ListenError(f"LISTEN_FDS={count} is not a number up to {_MAX_FDS}")
    sockets = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ListenError(f"descriptor {fd} of LISTEN_FDS={count} is not a socket: {error}") from None
        if not listens or sock.type != socket.SOCK_STREAM or sock.family not in _FAMILIES:
            raise ListenError(
                f"descriptor {fd} of LISTEN_FDS={count} does not listen for TCP or on a Unix socket; "
                "the socket unit must say ListenStream= and Accept=no"
            )
        sockets.append(sock)
    return sockets


@contextmanager
def listening(settings: Settings, inherited: Sequence[socket.socket] = ()) -> Iterator[list[socket.socket]]:
    """Yields the inherited sockets, or binds one for each address. Closes them at the end, and removes the paths of the
    daemon's own Unix sockets. :raises ListenError:"""
    sockets: list[socket.socket] = list(inherited)
    paths: list[Path] = []
    try:
        for address in split(settings.api_listen_addr) if not inherited else ():
            try:
                if address.startswith("unix:"):
                    path = Path(address.removeprefix("unix:"))
                    sockets.append(_bind_unix(path))
                    paths.append(path)
                else:
                    sockets += _bind_tcp(*parse_address(address))
            except UnsafeDirectory as error:
                raise ListenError(f"can't listen on {address}: {error}") from None
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


@contextmanager
def listening_for_hosts(settings: Settings) -> Iterator[list[socket.socket]]:
    """Binds the sockets for the other hosts of the fleet; none without a fleet. :raises ListenError:"""
    sockets: list[socket.socket] = []
    try:
        if settings.fleet_etcd:
            try:
                sockets = _bind_tcp(*parse_address(settings.fleet_listen))
            except OSError as error:
                raise ListenError(f"can't listen on {settings.fleet_listen}: {error.strerror or error}") from None
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


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
            # Each family would get another free port.
            break
    return sockets


def _bind_unix(path: Path) -> socket.socket:
    # A user that can replace the socket would receive the clients' API keys.
    for warning in check_way_to(path):
        _logger.warning("%s", warning)
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
    """Removes the socket that a killed daemon left at `path`. Raises OSError if it is in use or not a socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(None, "the path exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileExistsError(None, "another process listens there")


def address_of(sock: socket.socket, *, tls: bool = False) -> str:
    """Returns the address in the form for clients: `http://127.0.0.1:7777` or `unix:/path`.

    :param tls: whether TCP is served with TLS
    """
    setting = setting_of(sock)
    if sock.family == socket.AF_UNIX:
        return setting
    return f"{'https' if tls else 'http'}://{setting}"


def is_reached_from_outside(sock: socket.socket) -> bool:
    """Returns whether it listens on another address than loopback."""
    return (
        sock.family != socket.AF_UNIX and not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
    )


def setting_of(sock: socket.socket) -> str:
    """Returns the address in the form of the settings: `HOST:PORT`, `[V6]:PORT` or `unix:/path`."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"
