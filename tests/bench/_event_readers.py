"""Many readers of one event stream, in their own process: `python -m tests.bench._event_readers --help`.

During the measurement it only reads and counts bytes; afterwards it checks each event of each reader. It prints the
result as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path

from ._http import TIMEOUT_S, LoadError, connect, get

_READ = 256 * 1024
_MARK = b"\nevent: "
"""One for each event; a chunk never ends within an event."""
_ROUND_S = 120.0
_ID = re.compile(rb"^id: ([0-9a-f]+)-(\d+)\nevent: \w+\ndata: (.*)\Z")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench._event_readers", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("path")
    parser.add_argument("control", help="the socket by which events are let pass")
    parser.add_argument("--readers", type=int, required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--save", type=Path, help="where to put the body that one reader has got, chunked as it came")
    options = parser.parse_args()
    with Control(options.control) as control:
        readers = [_Reader(options.url, options.path) for _ in range(options.readers)]
        for reader in readers:
            reader.begin()
        before = control.ask()
        began = time.perf_counter()
        control.say(options.events)
        _read_all(readers, options.events)
        seconds = time.perf_counter() - began
        control.answer()
        cpu_s = control.ask()["cpu_s"] - before["cpu_s"]
    first = b"".join(dechunked(bytes(readers[0].data)))
    _check(first, options.events)
    for reader in readers[1:]:
        data = b"".join(dechunked(bytes(reader.data)))
        # The rest is the same, except for the keep-alive comments.
        if data != first:
            _check(data, options.events)
    if options.save is not None:
        options.save.write_bytes(readers[0].data)
    json.dump({"seconds": seconds, "cpu_s": cpu_s, "bytes": sum(len(reader.data) for reader in readers)}, sys.stdout)


class Control:
    """The client of the control socket of `_event_server.py`."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(_ROUND_S)
        self._sock.connect(path)

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def say(self, events: int) -> None:
        """Starts `count` events."""
        self._sock.sendall(b"%d\n" % events)

    def answer(self) -> dict[str, float]:
        """Waits until they are sent; returns `cpu_s` and `resident_mb` of the server."""
        figures: dict[str, float] = json.loads(self._sock.recv(1000))
        return figures

    def ask(self, events: int = 0) -> dict[str, float]:
        """Starts events and waits for them."""
        self.say(events)
        return self.answer()


class _Reader:
    def __init__(self, url: str, path: str) -> None:
        self.sock = connect(url)
        self.sock.sendall(get(url, path))
        self.data = bytearray()
        self._counted = 0
        self._seen = 0

    def begin(self) -> None:
        """Reads the head, and the first block of the stream."""
        while not self.data.endswith(b"\n\n\r\n"):
            self._take()
        head, _, rest = self.data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 ") or b"chunked" not in head.lower():
            raise LoadError(f"the server answered {bytes(head[:200])!r}")
        self.data = bytearray(rest)
        self.sock.setblocking(False)

    def read(self) -> None:
        """Reads what has arrived."""
        self._take()
        # Search again from where a mark may have been split.
        start = max(0, self._counted - len(_MARK) + 1)
        self._seen += self.data.count(_MARK, start)
        self._counted = len(self.data)

    def has(self, events: int) -> bool:
        return self._seen >= events and self.data.endswith(b"\n\n\r\n")

    def _take(self) -> None:
        piece = self.sock.recv(_READ)
        if not piece:
            raise LoadError("the server closed the stream")
        self.data += piece


def _read_all(readers: list[_Reader], events: int) -> None:
    selector = selectors.DefaultSelector()
    for reader in readers:
        selector.register(reader.sock, selectors.EVENT_READ, reader)
    left = len(readers)
    while left:
        ready = selector.select(TIMEOUT_S)
        if not ready:
            raise LoadError(f"nothing comes any more, and {left} readers have not got all")
        for key, _ in ready:
            key.data.read()
            if key.data.has(events):
                selector.unregister(key.data.sock)
                left -= 1
    selector.close()


def dechunked(data: bytes) -> list[bytes]:
    """Yields the chunks of a chunked body."""
    pieces = []
    start = 0
    while start < len(data):
        end = data.index(b"\r\n", start)
        size = int(data[start:end], 16)
        pieces.append(bytes(data[end + 2 : end + 2 + size]))
        start = end + 2 + size + 2
    return pieces


def _check(data: bytes, events: int) -> None:
    """Checks the events. :raises LoadError: if one is missing, repeated, out of order or invalid"""
    blocks = [block for block in data.split(b"\n\n") if b"\ndata: " in block]
    if len(blocks) != events:
        raise LoadError(f"a reader has got {len(blocks)} events of {events}")
    before = None
    for block in blocks:
        found = _ID.match(block)
        if found is None:
            raise LoadError(f"this is no event: {block[:200]!r}")
        epoch, seq = found[1], int(found[2])
        if before is not None and before != (epoch, seq - 1):
            raise LoadError(f"event {seq} of {epoch!r} follows {before}")
        if json.loads(found[3])["id"] != f"{epoch.decode()}-{seq}":
            raise LoadError(f"the event in {block[:200]!r} has another id")
        before = epoch, seq


if __name__ == "__main__":
    main()
