"""Connections to vsock ports through a hypervisor's Unix socket, as Firecracker and Cloud Hypervisor have it."""

from __future__ import annotations

import errno
from pathlib import Path

import trio

from volant.host import Host

_MAX_ANSWER = 64


async def connect_hybrid(host: Host, path: Path, port: int, timeout_s: float) -> trio.SocketStream:
    """Connects to a vsock port of a guest: sends `CONNECT <port>`, and reads `OK <number>`, or the end of the stream if
    nobody listens.

    :raises OSError, trio.TooSlowError, trio.BrokenResourceError: there is no connection
    """
    with trio.fail_after(timeout_s):
        stream = await host.sockets.connect_unix(path, timeout_s)
        try:
            await stream.send_all(f"CONNECT {port}\n".encode())
            line = b""
            # Byte by byte: what follows the line belongs to the caller.
            while not line.endswith(b"\n") and len(line) < _MAX_ANSWER:
                byte = await stream.receive_some(1)
                if not byte:
                    break
                line += byte
            if not (line.startswith(b"OK ") and line.endswith(b"\n")):
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"the guest refused port {port}")
            return stream
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
