"""A load generator: keep-alive HTTP/1.1 on raw sockets, which is cheap compared with the server.

All functions block, have a deadline, and are meant for threads.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from urllib.parse import urlsplit

TIMEOUT_S = 30.0
_READ = 64 * 1024


class LoadError(Exception):
    """The server did not answer as expected."""


def connect(base_url: str) -> socket.socket:
    """Connects to the server at `base_url`, over TLS without a look at the certificate for `https://`."""
    parts = urlsplit(base_url)
    sock = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return unverified().wrap_socket(sock) if parts.scheme == "https" else sock


def unverified() -> ssl.SSLContext:
    """Returns a context for TLS without a look at the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def get(base_url: str, path: str, key: str | None = None) -> bytes:
    """Returns the bytes of a GET request, perhaps with an API key."""
    shown = "" if key is None else f"X-Volant-API-Key: {key}\r\n"
    return f"GET {path} HTTP/1.1\r\nHost: {urlsplit(base_url).netloc}\r\n{shown}\r\n".encode()


def get_once(base_url: str, path: str) -> int:
    """Sends one request on its own connection; returns the status."""
    with connect(base_url) as sock:
        sock.sendall(get(base_url, path).removesuffix(b"\r\n") + b"Connection: close\r\n\r\n")
        with sock.makefile("rb") as answer:
            head = answer.readline()
            answer.read()
    if not head.startswith(b"HTTP/1.1 "):
        raise LoadError(f"the server answered {head!r}")
    return int(head.split()[1])


def requests_per_s(base_url: str, path: str, *, connections: int, seconds: float, key: str | None = None) -> float:
    """Returns the requests a second that are answered with 200, with `connections` that repeat them at once."""
    request = get(base_url, path, key)
    selector = selectors.DefaultSelector()
    clients = [_Client(connect(base_url)) for _ in range(connections)]
    answered = 0
    try:
        for client in clients:
            client.sock.setblocking(False)
            selector.register(client.sock, selectors.EVENT_READ, client)
        began = time.perf_counter()
        until = began + seconds
        for client in clients:
            client.sock.send(request)
        while (now := time.perf_counter()) < until:
            for found, _ in selector.select(until - now):
                if found.data.read():
                    answered += 1
                    found.data.sock.send(request)
        return answered / (time.perf_counter() - began)
    finally:
        selector.close()
        for client in clients:
            client.sock.close()


def latencies_s(base_url: str, path: str, *, count: int, interval_s: float) -> list[float]:
    """Sends `count` requests, one every `interval_s`; returns the seconds of each.

    A late server does not delay the schedule: the time of an answer counts from when its request was due.
    """
    request = get(base_url, path)
    client = _Client(connect(base_url))
    took = []
    try:
        due = time.perf_counter()
        for _ in range(count):
            time.sleep(max(0.0, due - time.perf_counter()))
            client.sock.sendall(request)
            while not client.read():
                pass
            took.append(time.perf_counter() - due)
            due += interval_s
        return took
    finally:
        client.sock.close()


class _Client:
    """A connection with one request under way."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""

    def read(self) -> bool:
        """Reads what has arrived; returns whether the answer is complete. :raises LoadError: if it is not a 200"""
        try:
            data = self.sock.recv(_READ)
        except ssl.SSLWantReadError:
            # A record is not complete yet, or was no data.
            return False
        if not data:
            raise LoadError("the server closed the connection")
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return False
        if not self._data.startswith(b"HTTP/1.1 200 "):
            raise LoadError(f"the server answered {self._data[:100]!r}")
        size = 0
        head = self._data[:end].lower()
        found = head.find(b"\r\ncontent-length:")
        if found >= 0:
            size = int(head[found + 17 :].partition(b"\r\n")[0])
        elif b"chunked" in head:
            raise LoadError("the answer has no length")
        if len(self._data) < end + 4 + size:
            return False
        self._data = b""
        return True
