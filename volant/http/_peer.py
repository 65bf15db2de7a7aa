"""Checks whether a client on this host still has its end of a connection.

TCP shows no difference between a client that has only closed its direction and one that has exited. Over loopback the
kernel also has the other end: a socket that no process holds any more has no inode.
"""

from __future__ import annotations

import trio

from volant.model.loopback import holder, is_loopback


def is_abandoned(sock: trio.socket.SocketType) -> bool:
    """Whether the other end is on loopback, and no process holds it. False where that can't be found out."""
    try:
        here, there = sock.getsockname()[:2], sock.getpeername()[:2]
        found = holder(there, here) if is_loopback(there[0]) else None
    except (OSError, ValueError):
        return False
    return found is not None and not found.inode
