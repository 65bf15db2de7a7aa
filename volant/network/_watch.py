"""Hears from the kernel that somebody has taken our bridge or a firewall table of ours away.

That is no rare thing: Debian's own `/etc/nftables.conf` begins with `flush ruleset`, so whoever reloads it takes all
tables with it, and with ours what keeps guests apart. Netlink tells of each change as it is made. A table that is gone
and there again in one transaction was replaced, which is what we do ourselves, so nobody has to be told apart from us.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import closing

import trio

_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GROUP_LINK, _GROUP_NFTABLES = 1, 7
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 16 * 1024 * 1024
"""The kernel tells of each element too: a firewall of a thousand VMs that is replaced has to fit, or each replacement
would look like a loss, and be answered by the next."""
_DELLINK = 17
_NEWTABLE, _DELTABLE, _NEWGEN = 0x0A00, 0x0A02, 0x0A0F
_FAMILIES = {1: "inet", 7: "bridge"}
_NAME_OF_LINK, _NAME_OF_TABLE = 3, 1
_PACE_S = 1.0
"""Who takes them away again and again is answered this often."""


async def watch(bridge: str, tables: Collection[str], torn: Callable[[str], None]) -> None:
    """Call `torn` with what has happened, each time. Until it is cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, _NETLINK_ROUTE, _GROUP_LINK, _Links(bridge), torn)
        nursery.start_soon(_watch, _NETLINK_NETFILTER, _GROUP_NFTABLES, _Tables(tables), torn)


async def _watch(protocol: int, group: int, told: _Links | _Tables, torn: Callable[[str], None]) -> None:
    with closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        while True:
            await trio.lowlevel.wait_readable(sock)
            why = _read(sock, told)
            if why is not None:
                torn(why)
                await trio.sleep(_PACE_S)


def _read(sock: socket.socket, told: _Links | _Tables) -> str | None:
    """What the next datagram tells of."""
    try:
        data = sock.recv(1 << 20)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        return "the kernel told of more changes than could be read"
    why = None
    for kind, payload in _messages(data):
        why = told.hear(kind, payload) or why
    return why


class _Links:
    """Whether a link goes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def hear(self, kind: int, payload: bytes) -> str | None:
        if kind == _DELLINK and _attribute(payload[16:], _NAME_OF_LINK) == self._name:
            return f"the bridge {self._name} was removed"
        return None


class _Tables:
    """Whether tables go, and are not there again when the transaction ends."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._gone: dict[str, None] = {}

    def hear(self, kind: int, payload: bytes) -> str | None:
        if kind in (_NEWTABLE, _DELTABLE):
            name = f"{_FAMILIES.get(payload[0])} {_attribute(payload[4:], _NAME_OF_TABLE)}"
            if name in self._names and kind == _DELTABLE:
                self._gone[name] = None
            else:
                self._gone.pop(name, None)
        elif kind == _NEWGEN and self._gone:
            gone, self._gone = self._gone, {}
            return f"the firewall's table {' and the table '.join(gone)} was removed"
        return None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if length < 16:
            return
        yield kind, data[at + 16 : at + length]
        at += (length + 3) & ~3


def _attribute(data: bytes, wanted: int) -> str:
    """The text of an attribute; empty: it is not there."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        if kind & 0x3FFF == wanted:
            return os.fsdecode(data[at + 4 : at + length].rstrip(b"\0"))
        at += (length + 3) & ~3
    return ""
