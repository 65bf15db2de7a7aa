"""Checks whether a client on this host still has its end of a connection.

TCP shows no difference between a client that has only closed its direction and one that has exited. Over loopback the
kernel also has the other end: a socket that no process holds any more has no inode (sock_diag(7)).
"""

from __future__ import annotations

import ipaddress
import socket
import struct

import trio

_SOCK_DIAG = 4
_BY_FAMILY = 20
_REQUEST = 1
_ANY_COOKIE = 2**32 - 1
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=4x48xIIIII")


def is_abandoned(sock: trio.socket.SocketType) -> bool:
    """Whether the other end is on loopback, and no process holds it. False where that can't be found out."""
    try:
        here, there = sock.getsockname()[:2], sock.getpeername()[:2]
        local, remote = (_plain(address) for address, _ in (here, there))
        if local.version != remote.version or not remote.is_loopback:
            return False
        family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
        ports = struct.pack("!HH", there[1], here[1])
        ends = remote.packed.ljust(16, b"\0") + local.packed.ljust(16, b"\0")
        wanted = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ANY_COOKIE) + ports + ends
        wanted += struct.pack("=III", 0, _ANY_COOKIE, _ANY_COOKIE)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _SOCK_DIAG) as netlink:
            netlink.connect((0, 0))
            netlink.send(_HEADER.pack(_HEADER.size + len(wanted), _BY_FAMILY, _REQUEST, 1, 0) + wanted)
            # The kernel answers within the call to send().
            answer = netlink.recv(4096)
        kind = _HEADER.unpack_from(answer)[1]
        if kind != _BY_FAMILY:
            return False
        return bool(_MESSAGE.unpack_from(answer, _HEADER.size)[4] == 0)
    except (OSError, ValueError, struct.error):
        return False


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address)
    return getattr(parsed, "ipv4_mapped", None) or parsed
