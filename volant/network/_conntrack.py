"""Removes the connections of an address from the host's connection tracking.

A deleted VM's entries would stay for up to five days, and the next VM with its address would get packets of connections
that it never had. The kernel selects the entries (a delete request with a tuple and `CTA_FILTER`), so the cost does not
grow with the host's table. pyroute2 can't filter, hence the few lines of netlink.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

_NETFILTER = 12
_DELETE = 1 << 8 | 2
"""NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE."""
_REQUEST_ACK = 1 | 4
_NESTED = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY, _FILTER = 1, 2, 25
_IP, _V4_SRC = 1, 1
_ORIG_FLAGS, _REPLY_FLAGS = 1, 2
_BY_SOURCE = 1
_ANSWER_S = 5.0


def forget_connections(address: str) -> None:
    """Removes the connections from and to `address`.

    A kernel that can't filter refuses the request and keeps the entries until they expire (before Linux 6.11).

    :raises OSError: when the kernel refuses for another reason, or does not answer within 5 s.
    """
    packed = ipaddress.IPv4Address(address).packed
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER) as netlink:
        netlink.settimeout(_ANSWER_S)
        # The client is the source of the first packet, the server the source of the first answer.
        for kind, orig, reply in ((_TUPLE_ORIG, _BY_SOURCE, 0), (_TUPLE_REPLY, 0, _BY_SOURCE)):
            source = _attribute(kind | _NESTED, _attribute(_IP | _NESTED, _attribute(_V4_SRC, packed)))
            flags = _attribute(_ORIG_FLAGS, struct.pack("=I", orig)) + _attribute(
                _REPLY_FLAGS, struct.pack("=I", reply)
            )
            body = struct.pack("=BBH", socket.AF_INET, 0, 0) + source + _attribute(_FILTER | _NESTED, flags)
            netlink.send(struct.pack("=IHHII", 16 + len(body), _DELETE, _REQUEST_ACK, 1, 0) + body)
            code = -struct.unpack_from("=i", netlink.recv(4096), 16)[0]
            if code not in (0, errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
                raise OSError(code, os.strerror(code))


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)
