"""Free ports of the loopback interface."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_FIRST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Returns a free port below those that the kernel assigns by itself, so it stays free until a caller binds it."""
    handed_out = int(_RANGE.read_text().split()[0])
    while True:
        port = random.randrange(_FIRST, handed_out)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
