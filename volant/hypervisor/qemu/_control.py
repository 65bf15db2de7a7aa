"""Connects to QEMU's control socket."""

from __future__ import annotations

from pathlib import Path

import trio

from volant.host import Host

_RETRY_S = 0.005


async def connect_control(host: Host, path: Path, timeout_s: float) -> trio.SocketStream:
    """Connects as soon as QEMU listens at `path`. `timeout_s` limits each attempt, not the time until QEMU listens.

    :raises OSError: when the connection fails. :raises trio.TooSlowError: when an attempt takes too long.
    """
    if not host.files.exists(path):
        # The end of the last watch keeps the event loop waiting for the kernel, often for ten milliseconds.
        with host.watches.open(path.parent) as names:
            while not host.files.exists(path):
                await names.wait()
    while True:
        try:
            return await host.sockets.connect_unix(path, timeout_s)
        except ConnectionRefusedError:
            # QEMU has bound the socket and does not listen yet, which takes microseconds.
            await trio.sleep(_RETRY_S)
