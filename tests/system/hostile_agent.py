"""A hostile agent, which replaces the agent's multiplexer in an initramfs of the tests.

It is honest until /run/hostile or `hostile=NAME` on the kernel's command line names a behaviour. Then the agent ends,
and the next one that PID 1 starts shows that behaviour from its first byte. It is given the virtio-serial port.
"""

# ruff: noqa: PTH110, PTH118, PTH120, PTH123 - the guest has no pathlib

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Serve = Callable[[socket.socket], None]

TOLD = "/run/hostile"
MAGIC = b"volant-resync-1\n"
NONCE = 16
LOG_ROUTE = b"/v1/daemon/logs"


def run(open_port: Callable[[], int], serve: Serve) -> None:
    """Replaces the function of the agent that never returns."""
    name = told()
    if name:
        print(f"hostile: {name}", file=sys.stderr, flush=True)
    if name in PORTS:
        port = Port(open_port())
        PORTS[name](port)
        time.sleep(1e9)
    honest = load_honest()
    if name in SERVERS:
        honest["run"](open_port, lambda sock: turn(sock, SERVERS[name], serve))
    threading.Thread(target=watch, daemon=True).start()
    honest["run"](open_port, serve)


def told() -> str:
    """Returns the name of the behaviour, or nothing."""
    if os.path.exists(TOLD):
        with open(TOLD) as handle:
            return handle.read().strip()
    with open("/proc/cmdline") as handle:
        words = handle.read().split()
    return "".join(word[8:] for word in words if word.startswith("hostile="))


def watch() -> None:
    while not os.path.exists(TOLD):
        time.sleep(0.05)
    time.sleep(0.2)  # first let the command that wrote the file get its answer
    os._exit(1)


def load_honest() -> dict[str, Any]:
    """Loads the real multiplexer, whose byte code is next to this file."""
    import _frozen_importlib_external as external  # the guest has no importlib.util to rely on

    name = "volant.guest._mux"
    path = os.path.join(os.path.dirname(__file__), "_mux.pyc")
    module: dict[str, Any] = {"__name__": name, "__package__": "volant.guest", "__builtins__": __builtins__}
    code = external.SourcelessFileLoader(name, path).get_code(name)
    assert code is not None
    exec(code, module)
    return module


# Behaviours on the port itself


class Port:
    """The guest's end of the port. Sends `answer` whenever the host asks for a fresh start."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, True)
        self.fd = fd
        self.answers: list[bytes] = []
        self.asked = threading.Event()

    def read(self) -> None:
        """Drops everything that the host sends except its requests; runs in a thread."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        seen = b""
        while True:
            data = os.read(self.fd, 65536)
            if not data:
                time.sleep(0.05)  # the host is not connected
                continue
            seen += data
            at = seen.find(MAGIC)
            if at < 0:
                seen = seen[-len(MAGIC) :]
            elif len(seen) >= at + len(MAGIC) + NONCE:
                at += len(MAGIC)
                self.answers.append(seen[at : at + NONCE] + frame(4, 0, 0))
                seen = b""
                self.asked.set()
            else:
                seen = seen[at:]

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.fd, rest) :]

    def flood(self, chunk: bytes) -> None:
        """Writes `chunk` without end, after a valid start each time that the host asks for one."""
        self.read()
        self.asked.wait()
        while True:
            if self.answers:
                self.write(self.answers.pop(0))
            self.write(chunk)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream_id) + payload


def garbage(port: Port) -> None:
    while True:
        port.write(os.urandom(65536))


def zeros(port: Port) -> None:
    while True:
        port.write(bytes(65536))


def hello(port: Port) -> None:
    """Says again and again that it has started, and ignores answers."""
    while True:
        port.write(bytes(40_000) + MAGIC + bytes(NONCE))


def half(port: Port) -> None:
    """Sends half a frame, then nothing."""
    port.read()
    port.asked.wait()
    port.write(port.answers.pop() + frame(0, 0, 1, bytes(16384))[:100])
    time.sleep(1e9)


def deaf(port: Port) -> None:
    """Reads nothing at all, not even the request for a start."""
    port.write(bytes(40_000) + MAGIC + bytes(NONCE))


def huge(port: Port) -> None:
    """Sends frames of 16 MiB."""
    port.flood(b"\xff\xff\xff" + bytes(6) + bytes(65536))


def pings(port: Port) -> None:
    port.flood(frame(6, 0, 0, bytes(8)) * 2000)


def settings(port: Port) -> None:
    port.flood(frame(4, 0, 0, struct.pack(">HI", 4, 65535) * 2730) * 4)


def data(port: Port) -> None:
    """Sends more than the windows allow, on streams that were never opened."""
    port.flood(frame(0, 0, 1, bytes(16384)) * 4)


# Behaviours on streams of an honest multiplexer


def turn(sock: socket.socket, answer: Callable[[bytes], Iterator[bytes] | None], serve: Serve) -> None:
    """Answers a request with the result of `answer(head)`; honestly if it is None."""

    def talk() -> None:
        head = sock.recv(4096, socket.MSG_PEEK)
        pieces = answer(head)
        if pieces is None:
            serve(sock)
            return
        with sock:
            try:
                for piece in pieces:
                    sock.sendall(piece)
            except OSError:
                pass  # the host has closed the stream

    threading.Thread(target=talk, daemon=True).start()


def endless_head(head: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nA: "
    while True:
        yield b"b" * 65536


def endless_body(head: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + b"[" * 65536 + b"\r\n"


def small_chunks(head: bytes) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"1\r\n[\r\n" * 10_000


def lies(head: bytes) -> Iterator[bytes]:
    """Answers with an error and a long text, in bytes that are not UTF-8 for health checks."""
    story = b'"\xff"' if b"/healthz" in head else b'{"detail": "' + b"why " * 200_000 + b'"}'
    yield b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(story) + story


def silence(head: bytes) -> Iterator[bytes]:
    time.sleep(1e9)
    yield b""


def logs(chunk: bytes) -> Callable[[bytes], Iterator[bytes] | None]:
    """Sends endless output of a workload in such bytes; answers other requests honestly."""

    def answer(head: bytes) -> Iterator[bytes] | None:
        return pour() if LOG_ROUTE in head else None

    def pour() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nVolant-Log-Id: hostile\r\nTransfer-Encoding: chunked\r\n\r\n"
        position = 0
        while True:
            said = struct.pack("!BQQI", 1, position, 0, len(chunk)) + chunk
            position += len(chunk)
            yield b"%x\r\n" % len(said) + said + b"\r\n"

    return answer


PORTS: dict[str, Callable[[Port], None]] = {
    "garbage": garbage,
    "zeros": zeros,
    "hello": hello,
    "half": half,
    "deaf": deaf,
    "huge": huge,
    "pings": pings,
    "settings": settings,
    "data": data,
}
SERVERS: dict[str, Callable[[bytes], Iterator[bytes] | None]] = {
    "endless-head": endless_head,
    "endless-body": endless_body,
    "small-chunks": small_chunks,
    "lies": lies,
    "silence": silence,
    "line-feeds": logs(b"\n" * 65536),
    "no-text": logs(b"\xff" * 65536),
    "empty-frames": logs(b""),
}
