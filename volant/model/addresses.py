"""IP addresses in one form, metadata services, and the holders of TCP connections on this host (sock_diag(7))."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import NamedTuple

_SOCK_DIAG = 4
_BY_FAMILY = 20
_REQUEST = 1
_ANY_COOKIE = 2**32 - 1
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=4x48xIIIII")

AZURE = "168.63.129.16"
"""Azure's metadata service. Azure's DNS server has the same address."""
METADATA = ("169.254.0.0/16", AZURE, "100.100.100.200", "192.0.0.192")
"""Metadata services, which return credentials to a cloud's machines: of most clouds, Azure, Alibaba, Oracle."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
End = tuple[str, int]
"""An address and a port."""


class Holder(NamedTuple):
    """The holder of a socket."""

    uid: int
    inode: int
    """The socket's inode; 0 if no process holds it: it has exited, or has not accepted the connection yet. `uid` is
    then meaningless."""


def holder(end: End, other: End) -> Holder | None:
    """Returns the holder of the end `end` of a connection on loopback of this network namespace; None if there is none.
    Raises OSError and ValueError if the kernel can't be asked."""
    here, there = plain_address(end[0]), plain_address(other[0])
    if here.version != there.version:
        raise ValueError(f"{here} and {there} are addresses of two kinds")
    family = socket.AF_INET if here.version == 4 else socket.AF_INET6
    ports = struct.pack("!HH", end[1], other[1])
    ends = here.packed.ljust(16, b"\0") + there.packed.ljust(16, b"\0")
    wanted = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ANY_COOKIE) + ports + ends
    wanted += struct.pack("=III", 0, _ANY_COOKIE, _ANY_COOKIE)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _SOCK_DIAG) as netlink:
        netlink.connect((0, 0))
        netlink.send(_HEADER.pack(_HEADER.size + len(wanted), _BY_FAMILY, _REQUEST, 1, 0) + wanted)
        # The kernel answers within the call to send().
        answer = netlink.recv(4096)
    try:
        if _HEADER.unpack_from(answer)[1] != _BY_FAMILY:
            return None
        *_, uid, inode = _MESSAGE.unpack_from(answer, _HEADER.size)
    except struct.error as error:
        raise ValueError("the kernel's answer is cut off") from error
    return Holder(uid, inode)


def server_of(client: End, server: End) -> int | None:
    """Returns the user whose process serves a connection, or listens if it was not accepted yet; None if no process of
    this network namespace does. Raises the same errors as `holder`."""
    found = holder(server, client)
    if found is not None and not found.inode:
        # The one that listens, on that address or on all.
        found = holder(server, ("0.0.0.0" if plain_address(server[0]).version == 4 else "::", 0))
    return found.uid if found is not None and found.inode else None


def is_loopback(address: str) -> bool:
    """Returns whether an address is on loopback. Raises ValueError if it is malformed."""
    return plain_address(address).is_loopback


def plain_address(text: str) -> Address:
    """Returns an address. `::ffff:192.0.2.1`, as an IPv6 socket shows it, becomes IPv4. :raises ValueError: it is
    malformed."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address
