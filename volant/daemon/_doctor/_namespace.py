"""Run as a program: makes a bridge, a tap and a question to nftables in a network namespace of its own, which ends
with it, and prints what each came to as JSON. Standard library alone, as it is run by its path.

As root the namespace is the host's user's; others get a user namespace besides, where that is allowed. What the kernel
lacks is lacking in both.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Callable

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_REQUEST, _ACK, _CREATE, _EXCLUSIVE = 0x01, 0x04, 0x400, 0x200
_ERROR = 2
_NEW_LINK = 16
_ROUTE, _NETFILTER = 0, 12
_NFT_GET_GENERATION = 10 << 8 | 16
_TUNSETIFF = 0x400454CA
_TAP, _NO_HEADER = 0x0002, 0x1000


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _ask(family: int, kind: int, flags: int, body: bytes) -> None:
    """Send one message of netlink; raises OSError for what comes back."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family) as sock:
        sock.settimeout(5)
        sock.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, 1, 0) + body)
        answer = sock.recv(8192)
    if struct.unpack_from("=H", answer, 4)[0] == _ERROR:
        error = -struct.unpack_from("=i", answer, 16)[0]
        if error:
            raise OSError(error, os.strerror(error))


def _bridge() -> None:
    link = _attribute(3, b"volant-check\0") + _attribute(18, _attribute(1, b"bridge"))
    _ask(_ROUTE, _NEW_LINK, _ACK | _CREATE | _EXCLUSIVE, struct.pack("=BxHiII", 0, 0, 0, 0, 0) + link)


def _tap() -> None:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"volant-check-t", _TAP | _NO_HEADER))
    finally:
        os.close(fd)


def _nftables() -> None:
    _ask(_NETFILTER, _NFT_GET_GENERATION, 0, struct.pack("=BBH", 0, 0, 0))


def _tried(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except OSError as error:
        return error.strerror or str(error)
    return None


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NET) and libc.unshare(_NEW_USER | _NEW_NET):
        outcome: dict[str, str | None] = {"namespace": os.strerror(ctypes.get_errno())}
    else:
        outcome = {"bridge": _tried(_bridge), "tap": _tried(_tap), "nftables": _tried(_nftables)}
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()
