"""Measures `/healthz` with fifty streams, and with hostile clients."""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from urllib.parse import urlsplit

from tests.system.kit import Daemon

from ._boot import WANTED
from ._figure import Figure, percentile
from ._http import LoadError, connect, get
from ._serving import beside_a_vm, probe

TARGET_MS = 100.0
EVENT_STREAMS = 20
LOG_READERS = 20
DOWNLOADS = 10
SLOW_CLIENTS = 200
SILENT_READERS = 20
IDLE_STREAMS = 500

_SETTLE_S = 1.0
_VM = f"/api/v1/vms/{WANTED.name}"
_CONSOLE = "exec >/dev/console; while :; do echo the console says this again and again and again; done"
_UPGRADE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


async def healthz_busy() -> list[Figure]:
    """The 99th percentile of `/healthz` while 50 streams run, and with hostile clients."""
    async with beside_a_vm() as (daemon, quiet):
        with _streams(daemon) as streams:
            time.sleep(_SETTLE_S)
            busy = await probe(daemon)
            rate = streams.rate_mb_s()
        with _hostile(daemon):
            time.sleep(_SETTLE_S)
            hostile = await probe(daemon)

    def figure(name: str, took: list[float], what: str) -> Figure:
        p99, before = 1000 * percentile(took, 99), 1000 * percentile(quiet, 99)
        return Figure(
            name, p99, "ms", p99 / before, f"the {before:.3g} ms beside a silent guest; {what}; "
            f"median {1000 * median(took):.2g} ms", within=TARGET_MS,
        )  # fmt: skip

    streaming = f"{EVENT_STREAMS} event streams, {LOG_READERS} log WebSockets, {DOWNLOADS} relayed answers"
    hoarding = f"{SLOW_CLIENTS} slow clients, {SILENT_READERS} that never read, {IDLE_STREAMS} idle event streams"
    return [
        figure("healthz_p99_streams", busy, streaming),
        figure("healthz_p99_hostile", hostile, hoarding),
        Figure("streams", rate, "MB/s", to="of all these streams together"),
    ]


class _Drain:
    """Reads many connections in one thread, and drops the data."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self.count = 0
        self.began = time.perf_counter()
        self.ended = 0

    def add(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)

    def start(self) -> None:
        self.began = time.perf_counter()
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(10)
        self._selector.close()

    def rate_mb_s(self) -> float:
        """Returns the MB/s so far. :raises LoadError: if one ended"""
        if self.ended:
            raise LoadError(f"{self.ended} streams broke off")
        return self.count / (time.perf_counter() - self.began) / 1e6

    def _run(self) -> None:
        buffer = bytearray(256 * 1024)
        while not self._over.is_set():
            for key, _ in self._selector.select(0.1):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    size = sock.recv_into(buffer)
                except OSError:
                    size = 0
                self.count += size
                if not size:
                    self.ended += 1
                    self._selector.unregister(sock)


@contextmanager
def _streams(daemon: Daemon) -> Iterator[_Drain]:
    with _sockets() as sockets:
        drain = _Drain()
        requests = [get(daemon.base_url, "/api/v1/events/vms")] * EVENT_STREAMS
        requests += [_upgrade(daemon, "tail=0")] * LOG_READERS
        requests += [_exec(daemon, ["cat", "/dev/zero"])] * DOWNLOADS
        requests += [_exec(daemon, ["sh", "-c", _CONSOLE])]
        for request in requests:
            drain.add(_begun(daemon, request, sockets))
        drain.start()
        try:
            yield drain
        finally:
            drain.stop()


@contextmanager
def _hostile(daemon: Daemon) -> Iterator[None]:
    over = threading.Event()
    with _sockets() as sockets:
        _begun(daemon, _exec(daemon, ["sh", "-c", _CONSOLE]), sockets)
        for request in [_upgrade(daemon, "since=0")] * SILENT_READERS:
            _begun(daemon, request, sockets)
        for request in [get(daemon.base_url, "/api/v1/events/vms")] * IDLE_STREAMS:
            _begun(daemon, request, sockets)
        slow = [connect(daemon.base_url) for _ in range(SLOW_CLIENTS)]
        sockets.extend(slow)

        def trickle() -> None:
            head = get(daemon.base_url, "/healthz").removesuffix(b"\r\n") + b"X-Slow: "
            for sock in slow:
                sock.sendall(head)
            while not over.wait(0.5):
                for sock in slow:
                    try:
                        sock.sendall(b"a")
                    except OSError:
                        pass  # The daemon has dropped it, as it should.

        thread = threading.Thread(target=trickle, name="trickle", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(10)


@contextmanager
def _sockets() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def _begun(daemon: Daemon, request: bytes, sockets: list[socket.socket]) -> socket.socket:
    """Returns a connection on which the answer to `request` has started."""
    sock = connect(daemon.base_url)
    sockets.append(sock)
    sock.sendall(request)
    head = sock.recv(12)
    if head not in (b"HTTP/1.1 200", b"HTTP/1.1 101"):
        raise LoadError(f"the stream did not begin: {head!r}")
    return sock


def _upgrade(daemon: Daemon, query: str) -> bytes:
    host = urlsplit(daemon.base_url).netloc
    return f"GET /ws/v1/vms/{WANTED.name}/logs?{query} HTTP/1.1\r\nHost: {host}\r\n{_UPGRADE}\r\n".encode()


def _exec(daemon: Daemon, command: list[str]) -> bytes:
    body = json.dumps({"command": command}).encode()
    head = (
        f"POST {_VM}/agent/v1/exec HTTP/1.1\r\nHost: {urlsplit(daemon.base_url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
