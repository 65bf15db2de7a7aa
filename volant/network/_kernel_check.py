"""A program that tests the kernel's support for networks, in its own network namespace, and prints errors as JSON.

Users other than root also get a user namespace, if the host allows it. Both namespaces end with the program.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
from collections.abc import Callable

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from volant.host import open_or_create_tap

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_NETFILTER = 12
_NFT_GET_GENERATION, _REQUEST, _ERROR = 10 << 8 | 16, 0x01, 2
_ANSWER_S = 5.0


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        outcome: dict[str, str | None] = {"namespace": os.strerror(ctypes.get_errno())}
    else:
        outcome = {"bridge": _error(_bridge), "tap": _error(_tap), "nftables": _error(_nftables)}
    json.dump(outcome, sys.stdout)


def _error(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except NetlinkError as error:
        return os.strerror(error.code)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _bridge() -> None:
    with IPRoute() as ipr:
        ipr.link("add", ifname="volant-check", kind="bridge")


def _tap() -> None:
    os.close(open_or_create_tap("volant-check-t"))


def _nftables() -> None:
    """Requests the generation of the ruleset, as pyroute2 has no call for it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as sock:
        sock.settimeout(_ANSWER_S)
        sock.send(struct.pack("=IHHIIBBH", 20, _NFT_GET_GENERATION, _REQUEST, 1, 0, 0, 0, 0))
        answer = sock.recv(8192)
    if struct.unpack_from("=H", answer, 4)[0] == _ERROR and (code := -struct.unpack_from("=i", answer, 16)[0]):
        raise OSError(code, os.strerror(code))


if __name__ == "__main__":
    main()
