"""An agent's server, and clients that talk to it over socketpairs as the multiplexer does."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from volant.guest import _root
from volant.guest._http import BodyFilter, framing_of, parse_head
from volant.guest._server import Server
from volant.model import agent as wire

TIMEOUT_S = 20.0
CAN_CHROOT = os.geteuid() == 0 and sys.version_info >= (3, 12)
needs_chroot = pytest.mark.skipif(not CAN_CHROOT, reason="this needs root, and the Python of a guest")


class Answer:
    """An answer, parsed as relays parse it."""

    def __init__(self, data: bytes) -> None:
        head, _, rest = data.partition(b"\r\n\r\n")
        line, headers = parse_head(head)
        self.status = int(line.split(b" ")[1])
        self.headers = {name.decode(): value.decode() for name, value in headers}
        framing = framing_of(headers)
        body = bytearray()
        self.whole = True
        if framing is None:
            body += rest
        else:
            follow = BodyFilter(framing)
            follow.feed(rest, body)
            self.whole = follow.done
        self.body = bytes(body)

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]


class Asker:
    """Opens streams to a server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.shut_down_with: list[float] = []
        self._open: list[socket.socket] = []

    def open(self, data: bytes = b"") -> socket.socket:
        mine, theirs = socket.socketpair()
        mine.settimeout(TIMEOUT_S)
        self._open.append(mine)
        self.server.serve(theirs)
        if data:
            mine.sendall(data)
        return mine

    def raw(self, data: bytes) -> bytes:
        """Sends `data`, half-closes, and returns everything that comes back."""
        mine = self.open(data)
        mine.shutdown(socket.SHUT_WR)
        return read_all(mine)

    def ask(self, method: str, target: str, body: object = None, headers: str = "") -> Answer:
        payload = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        length = f"Content-Length: {len(payload)}\r\n" if payload or method in ("POST", "PUT") else ""
        head = f"{method} {target} HTTP/1.1\r\nHost: agent\r\n{length}{headers}\r\n"
        return Answer(self.raw(head.encode() + payload))

    def run(self, *command: str, **fields: object) -> list[Any]:
        """Runs a command; returns the lines of the answer."""
        answer = self.ask("POST", "/v1/exec", {"command": list(command), **fields})
        assert answer.status == 200, answer.body
        assert answer.whole
        return answer.lines()

    def close(self) -> None:
        for sock in self._open:
            sock.close()


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while piece := sock.recv(1 << 20):
        data += piece
    return bytes(data)


def read_until(sock: socket.socket, enough: Callable[[bytes], object]) -> bytes:
    data = bytearray()
    while not enough(bytes(data)):
        piece = sock.recv(1 << 16)
        if not piece:
            break
        data += piece
    return bytes(data)


@pytest.fixture(autouse=True)
def manifest_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The path of the manifest, which is in /run in a guest."""
    path = tmp_path / "manifest.json"
    monkeypatch.setattr(wire, "MANIFEST_FILE", str(path))
    return path


@pytest.fixture
def agent() -> Iterator[Asker]:
    asked: list[float] = []
    asker = Asker(Server(asked.append))
    asker.shut_down_with = asked
    yield asker
    asker.server.workload.stop(0.0)
    asker.server.output.finish(0.0)
    asker.close()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A guest with a root filesystem: the file in which PID 1 reports the outcome of mounting it."""
    path = tmp_path / "state"
    monkeypatch.setattr(_root, "_known", None)
    monkeypatch.setattr(_root, "STATE_FILE", str(path))
    monkeypatch.setattr(_root, "ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(_root, "kernel_parameters", lambda: ["quiet", "volant.root=x"])
    (tmp_path / "root/etc").mkdir(parents=True)
    return path


@pytest.fixture
def mounted(told: Path, tmp_path: Path) -> Path:
    told.write_text("mounted\n")
    return tmp_path / "root"
