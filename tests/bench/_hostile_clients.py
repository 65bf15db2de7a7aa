"""Hostile clients: `python -m tests.bench._hostile_clients KIND URL` prints that address and goes on until it is ended.

handshakes  hundreds of TLS handshakes stay half open; others have the server compute and are never completed
heads       heads of 6,500 fields
refused     two thousand requests without a key whose bodies never come
searches    eight readers search the whole log of the VM for a stream that it does not have
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

from ._boot import WANTED
from ._http import get, unverified

_HALF_OPEN = 400
_AT_ONCE = 20
_PAUSE_S = 0.05
_TICK_S = 0.01
_READ = 256 * 1024


@dataclass(frozen=True)
class Flood:
    """A request that many clients send, each until the server has closed its connection."""

    request: bytes
    clients: int
    per_s: int
    """New connections a second, of all together."""


def main() -> None:
    """Goes on until it is ended."""
    kind, url = sys.argv[1:]
    parts = urlsplit(url)
    place = (parts.hostname or "", parts.port or 443)
    print(f"listening on {url}", flush=True)
    if kind == "handshakes":
        _handshakes(place)
    else:
        _flood(place, _floods(url)[kind])


def _floods(url: str) -> dict[str, Flood]:
    begun = get(url, "/").removesuffix(b"\r\n")
    posted = get(url, "/api/v1/vms").removesuffix(b"\r\n").replace(b"GET", b"POST", 1)
    search = get(url, f"/api/v1/vms/{WANTED.name}/logs?stream=stderr").removesuffix(b"\r\n")
    return {
        "heads": Flood(begun + b"a:b\r\n" * 6500 + b"\r\n", clients=200, per_s=100),
        "refused": Flood(posted + b"Content-Length: 1000000\r\n\r\n", clients=2000, per_s=300),
        "searches": Flood(search + b"Connection: close\r\n\r\n", clients=8, per_s=100),
    }


def _flood(place: tuple[str, int], flood: Flood) -> None:
    selector = selectors.DefaultSelector()
    held = 0
    allowed = 0.0
    last = time.perf_counter()
    while True:
        now = time.perf_counter()
        allowed = min(flood.per_s * _PAUSE_S, allowed + (now - last) * flood.per_s)
        last = now
        while allowed >= 1 and held < flood.clients:
            sock = socket.create_connection(place, timeout=30)
            with contextlib.suppress(OSError):  # It may have been refused already.
                sock.sendall(flood.request)
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ)
            held += 1
            allowed -= 1
        for key, _ in selector.select(_TICK_S):
            client = key.fileobj
            assert isinstance(client, socket.socket)
            try:
                ended = not client.recv(_READ)
            except OSError:
                ended = True
            if ended:
                selector.unregister(client)
                client.close()
                held -= 1


def _handshakes(place: tuple[str, int]) -> None:
    hello = _hello()
    threading.Thread(target=_half_open, args=(place, hello[:6]), daemon=True).start()
    while True:
        opened = [_begun(place, hello) for _ in range(_AT_ONCE)]
        time.sleep(_PAUSE_S)
        for sock in opened:
            sock.close()


def _half_open(place: tuple[str, int], data: bytes) -> None:
    opened: deque[socket.socket] = deque()
    while True:
        opened.append(_begun(place, data))
        if len(opened) > _HALF_OPEN:
            opened.popleft().close()
        time.sleep(_PAUSE_S / _AT_ONCE)


def _begun(place: tuple[str, int], data: bytes) -> socket.socket:
    sock = socket.create_connection(place, timeout=30)
    with contextlib.suppress(OSError):
        sock.sendall(data)
    return sock


def _hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    client = unverified().wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


if __name__ == "__main__":
    main()
