"""Measures the path of a DevTools client through the daemon: the time of a command, and bytes a second.

It asks the same server directly, through the agent alone, and through daemon and agent. There is no guest, because an
emulated one is slower than any relay and would hide the difference.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from urllib.parse import urlsplit

import trio

from ._figure import Figure, Pairs
from ._http import LoadError, connect
from ._relay_parts import VM
from ._world import listening, scratch

ROUNDS = 7
TRIPS = 300
SIZE = 64 * 1024 * 1024
_COMMAND = b'{"id":1,"method":"Browser.getVersion"}'
_BUFFER = bytearray(1024 * 1024)

Connect = Callable[[], socket.socket]


async def relays() -> list[Figure]:
    """A round trip of a CDP command, and 64 MiB out of the guest: DevTools, the agent's proxy, the port proxy."""
    with ExitStack() as stack:
        path = str(stack.enter_context(scratch()) / "vsock")
        module = "tests.bench._relay_parts"
        browser = stack.enter_context(listening(module, "browser"))
        port = urlsplit(browser).port or 0
        stack.enter_context(listening(module, "guest", path))
        daemon = stack.enter_context(listening(module, "daemon", path, str(port)))
        return await trio.to_thread.run_sync(_measure, browser, partial(_agent, path, port), daemon, port)


def _measure(browser: str, agent: Connect, daemon: str, port: int) -> list[Figure]:
    direct = partial(connect, browser)
    ours = partial(connect, daemon)
    page = "/devtools/page/1"
    devtools = f"/ws/v1/vms/{VM}/devtools/page/1"
    trips = {"direct": Pairs(), "agent": Pairs()}
    for number in range(ROUNDS):
        sides: list[tuple[str, Connect, str]] = [
            ("direct", direct, page),
            ("agent", agent, page),
            ("ours", ours, devtools),
        ]
        took = {name: trip_s(way, path) for name, way, path in (sides if number % 2 else reversed(sides))}
        trips["direct"].add(took["ours"], took["direct"])
        trips["agent"].add(took["agent"], took["direct"])
    ways: list[tuple[str, Callable[[], float]]] = [
        ("relay_agent_alone", partial(download_http, agent, "")),
        ("relay_agent", partial(download_http, ours, f"/api/v1/vms/{VM}/agent")),
        ("relay_port", partial(download_http, ours, f"/api/v1/vms/{VM}/ports/{port}")),
        ("relay_devtools", partial(download_websocket, ours, devtools)),
    ]
    rates = {name: Pairs() for name, _ in ways}
    for _ in range(ROUNDS):
        for name, way in ways:
            plain = download_websocket(direct, page) if "devtools" in name else download_http(direct, "")
            rates[name].add(way(), plain)
    to = "a direct connection to the same server"
    return [
        Figure("cdp_round_trip_agent_alone", 1000 * trips["agent"].value, "ms", trips["agent"].ratio,
               f"{to}, through the agent without the daemon"),
        Figure("cdp_round_trip", 1000 * trips["direct"].value, "ms", trips["direct"].ratio,
               f"the {1000 * trips['direct'].other:.2g} ms of {to}"),
        *(Figure(name, pairs.value, "MB/s", pairs.ratio, f"the {pairs.other:.0f} MB/s of {to}")
          for name, pairs in rates.items()),
    ]  # fmt: skip


def _agent(path: str, port: int) -> socket.socket:
    """Connects through the agent to a port, as the daemon does."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(path)
    sock.sendall(b"CONNECT 1024\n")
    _expect(sock, b"OK")
    sock.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: agent\r\n\r\n" % port)
    _expect(sock, b"HTTP/1.1 200", b"\r\n\r\n")
    return sock


def _expect(sock: socket.socket, begin: bytes, end: bytes = b"\n") -> None:
    """Reads up to `end`, byte by byte, because the following bytes are read elsewhere."""
    head = b""
    while not head.endswith(end):
        if not (byte := sock.recv(1)):
            break
        head += byte
    if not head.startswith(begin):
        raise LoadError(f"the answer is {head[:200]!r}")


def _websocket(way: Connect, path: str) -> socket.socket:
    sock = way()
    sock.sendall(
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    _expect(sock, b"HTTP/1.1 101", b"\r\n\r\n")
    return sock


def _say(sock: socket.socket, text: bytes) -> None:
    sock.sendall(b"\x81%c\0\0\0\0" % (0x80 | len(text)) + text)


def trip_s(way: Connect, path: str) -> float:
    """Returns the seconds of each of several commands."""
    with _websocket(way, path) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, b"\0" * 16)
        began = time.perf_counter()
        for _ in range(TRIPS):
            _say(sock, _COMMAND)
            data = sock.recv(65536)
            while len(data) < 2 + data[1]:
                data += sock.recv(65536)
        return (time.perf_counter() - began) / TRIPS


def download_websocket(way: Connect, path: str) -> float:
    with _websocket(way, path) as sock:
        return _rate(sock, partial(_say, sock, b"%d" % SIZE), 10 + SIZE)


def download_http(way: Connect, prefix: str, size: int = SIZE) -> float:
    """Returns the MB/s of an answer of `size` bytes."""
    request = f"GET {prefix}/{size} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with way() as sock:
        began = time.perf_counter()
        sock.sendall(request)
        _expect(sock, b"HTTP/1.1 200", b"\r\n\r\n")
        return _rate(sock, lambda: None, size, began)


def _rate(sock: socket.socket, ask: Callable[[], None], size: int, began: float | None = None) -> float:
    """Returns the MB/s of `size` bytes."""
    began = time.perf_counter() if began is None else began
    ask()
    left = size
    while left:
        count = sock.recv_into(_BUFFER, min(left, len(_BUFFER)))
        if not count:
            raise LoadError("the answer broke off")
        left -= count
    return SIZE / (time.perf_counter() - began) / 1e6
