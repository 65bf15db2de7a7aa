"""A hostile client of TLS: `python -m tests.bench._handshakes URL` prints that address and goes on until it is ended.

It keeps hundreds of handshakes half open, and has the server compute for others that it never completes.
"""

from __future__ import annotations

import socket
import ssl
import sys
import threading
import time
from collections import deque
from urllib.parse import urlsplit

from ._http import unverified

HALF = 400
AT_ONCE = 20
PAUSE_S = 0.05


def main() -> None:
    """Begins handshakes until it is ended."""
    parts = urlsplit(sys.argv[1])
    place = (parts.hostname or "", parts.port or 443)
    hello = _hello()
    threading.Thread(target=_half_open, args=(place, hello[:6]), daemon=True).start()
    print(f"listening on {sys.argv[1]}", flush=True)
    while True:
        opened = [_connected(place, hello) for _ in range(AT_ONCE)]
        time.sleep(PAUSE_S)
        for sock in opened:
            sock.close()


def _half_open(place: tuple[str, int], data: bytes) -> None:
    opened: deque[socket.socket] = deque()
    while True:
        opened.append(_connected(place, data))
        if len(opened) > HALF:
            opened.popleft().close()
        time.sleep(PAUSE_S / AT_ONCE)


def _connected(place: tuple[str, int], data: bytes) -> socket.socket:
    sock = socket.create_connection(place, timeout=30)
    try:
        sock.sendall(data)
    except OSError:
        pass
    return sock


def _hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    client = unverified().wrap_bio(ssl.MemoryBIO(), outgoing)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


if __name__ == "__main__":
    main()
