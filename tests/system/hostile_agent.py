"""An agent that means no good: it stands in an initramfs of the tests in the place of the agent's multiplexer.

It is honest until /run/hostile names a behaviour, or `hostile=NAME` on the kernel's command line. Then the agent ends,
and the one that PID 1 begins in its place does that from its first byte. What it is given is the virtio-serial port.
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
    """What the agent calls, and what does not return."""
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
    """The behaviour that is wanted, or nothing."""
    if os.path.exists(TOLD):
        with open(TOLD) as handle:
            return handle.read().strip()
    with open("/proc/cmdline") as handle:
        words = handle.read().split()
    return "".join(word[8:] for word in words if word.startswith("hostile="))


def watch() -> None:
    while not os.path.exists(TOLD):
        time.sleep(0.05)
    time.sleep(0.2)  # whoever has told gets an answer
    os._exit(1)


def load_honest() -> dict[str, Any]:
    """The real multiplexer, whose byte code lies beside this."""
    import _frozen_importlib_external as external  # the guest has no importlib.util to rely on

    name = "volant.guest._mux"
    path = os.path.join(os.path.dirname(__file__), "_mux.pyc")
    module: dict[str, Any] = {"__name__": name, "__package__": "volant.guest", "__builtins__": __builtins__}
    exec(external.SourcelessFileLoader(name, path).get_code(name), module)
    return module


# On the port itself


class Port:
    """The guest's end of the port. Whenever the host asks for a fresh start, `answer` is what it gets."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, True)
        self.fd = fd
        self.answers: list[bytes] = []
        self.asked = threading.Event()

    def read(self) -> None:
        """Throw away what the host says, but for its requests; in a thread."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        seen = b""
        while True:
            data = os.read(self.fd, 65536)
            if not data:
                time.sleep(0.05)  # nobody is there
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
        """Write it without end, behind a proper beginning each time that the host asks for one."""
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
    """It has begun, again and again, and hears no answer."""
    while True:
        port.write(bytes(40_000) + MAGIC + bytes(NONCE))


def half(port: Port) -> None:
    """A frame that never ends, to a host that is never read."""
    port.read()
    port.asked.wait()
    port.write(port.answers.pop() + frame(0, 0, 1, bytes(16384))[:100])
    time.sleep(1e9)


def deaf(port: Port) -> None:
    """It reads nothing at all, not even the request for a start."""
    port.write(bytes(40_000) + MAGIC + bytes(NONCE))


def huge(port: Port) -> None:
    """Headers of frames of 16 MiB, and 16 MiB behind each."""
    port.flood(b"\xff\xff\xff" + bytes(6) + bytes(65536))


def pings(port: Port) -> None:
    port.flood(frame(6, 0, 0, bytes(8)) * 2000)


def settings(port: Port) -> None:
    port.flood(frame(4, 0, 0, struct.pack(">HI", 4, 65535) * 2730) * 4)


def data(port: Port) -> None:
    """More than anybody has asked for, on streams that nobody has opened."""
    port.flood(frame(0, 0, 1, bytes(16384)) * 4)


# On streams that an honest multiplexer brings


def turn(sock: socket.socket, answer: Callable[[bytes], Iterator[bytes] | None], serve: Serve) -> None:
    """Answer a request with what it makes of its head; None: honestly."""

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
                pass  # the host has had enough

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
    """A failure, and a long story; in bytes that are no text where somebody asks for its health."""
    story = b'"\xff"' if b"/healthz" in head else b'{"detail": "' + b"why " * 200_000 + b'"}'
    yield b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(story) + story


def silence(head: bytes) -> Iterator[bytes]:
    time.sleep(1e9)
    yield b""


def logs(chunk: bytes) -> Callable[[bytes], Iterator[bytes] | None]:
    """Endless output of a workload, of such bytes; honest to all other requests."""

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
