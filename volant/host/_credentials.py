"""Opens files that a client names with the client's own rights, so that clients can't read through the daemon what they
can't read themselves.

The kernel says which user a client is: for a Unix socket with its groups (`SO_PEERCRED`, `SO_PEERGROUPS`), for a TCP
connection over loopback by the owner of the other end. On Linux the identity for access to files
belongs to a thread (setfsuid(2)), so a thread of its own takes the client's identity, opens the file and ends.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from volant.model.loopback import holder, is_loopback

from . import _sandbox
from ._walk import open_path

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
"""O_NONBLOCK, as to open a pipe would wait for its writer."""
_SO_PEERGROUPS = 59
_MAX_GROUPS_BYTES = 1024
"""What Python lets getsockopt(2) return: 256 groups."""


class Credentials(NamedTuple):
    """The user and the groups of a client's process."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def own(cls) -> Credentials:
        """This process."""
        return cls(os.geteuid(), os.getegid(), tuple(os.getgroups()))


class _Socket(Protocol):
    def getsockopt(self, level: int, optname: int, buflen: int) -> bytes: ...


def peer_credentials(sock: _Socket) -> Credentials:
    """Returns the credentials of a Unix socket's peer. A process with more than 256 groups counts as one without any.

    :raises OSError: the kernel does not say
    """
    _, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS_BYTES)
    except OSError:
        data = b""
    return Credentials(uid, gid, struct.unpack(f"{len(data) // 4}I", data))


def loopback_peer_uid(client: tuple[str, int], server: tuple[str, int]) -> int | None:
    """Returns the user that owns the client's end of a TCP connection over loopback, by both ends' addresses; None when
    it is not over loopback, or the connection is gone."""
    try:
        found = holder(client, server) if is_loopback(client[0]) and is_loopback(server[0]) else None
    except (OSError, ValueError):
        return None
    return found.uid if found is not None and found.inode else None


def open_as(credentials: Credentials, path: Path) -> int:
    """Opens a file for reading with a client's rights, and returns its descriptor.

    :raises OSError: the client may not, or this process may not act for it
    """
    if credentials.uid == os.geteuid():
        return open_path(path, _FLAGS)
    return _in_thread_of(credentials, lambda: open_path(path, _FLAGS))


def open_below(directories: Iterable[Path], path: Path) -> int:
    """Opens a file that lies in one of the directories, and returns its descriptor. No link leads out of a directory.

    :raises OSError: there is none
    """
    for directory, inner in _below(directories, path):
        return open_path(directory / inner, _FLAGS, within=directory)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def is_below(directories: Iterable[Path], path: Path) -> bool:
    """Returns whether a path lies in one of the directories by its text. Touches no file."""
    return any(True for _ in _below(directories, path))


def _below(directories: Iterable[Path], path: Path) -> Iterable[tuple[Path, Path]]:
    plain = Path(os.path.normpath(path))
    for directory in directories:
        if plain.is_relative_to(directory) and plain != directory:
            yield directory, plain.relative_to(directory)


def _in_thread_of(credentials: Credentials, work: Callable[[], int]) -> int:
    """Runs `work` with a client's rights over files. :raises OSError: as `work`, or EPERM."""

    def run() -> int:
        _sandbox.act_for(credentials.uid, credentials.gid, credentials.groups)
        return work()

    return _sandbox.in_own_thread(run, "client-file")
