"""Forgets the connections that the host's firewall tracks for an address.

A VM that is gone leaves entries behind, for up to five days: a flow to a port that it had published would go on to its
address, and a later VM with that address would get packets of connections that it never had. The kernel selects the
entries itself (a delete request with a tuple and `CTA_FILTER`), so the cost does not grow with the host's table as
that of a dump would. pyroute2 knows no filters, hence the few lines of netlink.
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
    """Remove the entries of connections that `address` began and of those that led to it.

    A kernel that cannot filter when it deletes refuses the request, and keeps the entries until they expire.

    :raises OSError: the kernel refuses for another reason, or does not answer within 5 s.
    """
    packed = ipaddress.IPv4Address(address).packed
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER) as netlink:
        netlink.settimeout(_ANSWER_S)
        # Who began a connection is the source of its first packet; whom it led to, of the first answer.
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
