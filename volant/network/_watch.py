"""Watches for the removal of the daemon's bridge and firewall tables, by netlink's notifications.

That is common: Debian's own `/etc/nftables.conf` begins with `flush ruleset`, so reloading it removes all tables, and
with them the isolation of guests. A table that is removed and created in one transaction was replaced, as the daemon
itself does, and does not count.
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
"""The kernel also reports each element. When the firewall of a thousand VMs is replaced all reports must fit: an
overflow counts as a loss, and would lead to the next replacement."""
_DELLINK = 17
_NEWTABLE, _DELTABLE, _NEWGEN = 0x0A00, 0x0A02, 0x0A0F
_FAMILIES = {1: "inet", 7: "bridge"}
_NAME_OF_LINK, _NAME_OF_TABLE = 3, 1
_PAUSE_S = 1.0
"""The minimum interval of reports, if something removes the bridge or a table repeatedly."""


async def watch(bridge: str, tables: Collection[str], on_loss: Callable[[str], None]) -> None:
    """Calls `on_loss` with a description of each loss, until cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, _NETLINK_ROUTE, _GROUP_LINK, _Links(bridge), on_loss)
        nursery.start_soon(_watch, _NETLINK_NETFILTER, _GROUP_NFTABLES, _Tables(tables), on_loss)


async def _watch(protocol: int, group: int, losses: _Links | _Tables, on_loss: Callable[[str], None]) -> None:
    with closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        sock.bind((0, 0))
        sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        while True:
            await trio.lowlevel.wait_readable(sock)
            loss = _read(sock, losses)
            if loss is not None:
                on_loss(loss)
                await trio.sleep(_PAUSE_S)


def _read(sock: socket.socket, losses: _Links | _Tables) -> str | None:
    """Returns the loss that the next datagram reports, if any."""
    try:
        data = sock.recv(1 << 20)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        return "the kernel dropped reports of changes"
    loss = None
    for kind, payload in _messages(data):
        loss = losses.handle(kind, payload) or loss
    return loss


class _Links:
    """Detects the removal of a link."""

    def __init__(self, name: str) -> None:
        self._name = name

    def handle(self, kind: int, payload: bytes) -> str | None:
        if kind == _DELLINK and _attribute(payload[16:], _NAME_OF_LINK) == self._name:
            return f"the bridge {self._name} was removed"
        return None


class _Tables:
    """Detects tables that are missing at the end of a transaction."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._gone: dict[str, None] = {}

    def handle(self, kind: int, payload: bytes) -> str | None:
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
    """Yields type and payload of each message."""
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if length < 16:
            return
        yield kind, data[at + 16 : at + length]
        at += (length + 3) & ~3


def _attribute(data: bytes, wanted: int) -> str:
    """Returns the text of an attribute, or an empty string without it."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        if kind & 0x3FFF == wanted:
            return os.fsdecode(data[at + 4 : at + length].rstrip(b"\0"))
        at += (length + 3) & ~3
    return ""
