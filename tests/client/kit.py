"""A server whose answers a test writes byte by byte: it can break off, stay silent, or speak WebSocket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Ping, TextMessage

Handler = Callable[["Request", trio.abc.Stream], Awaitable[None]]


@dataclass
class Request:
    """A request as it came."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    head: bytes
    body: bytes

    def param(self, name: str) -> str | None:
        """The last value of a parameter."""
        return dict(self.query).get(name)

    def json(self) -> Any:
        """The body."""
        return msgspec.json.decode(self.body)


@dataclass
class Server:
    """Answers what its routes say, and remembers what it was asked. A route that is a list gives each once."""

    base_url: str
    routes: dict[str, Handler | list[Handler]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def asked(self, path: str) -> list[Request]:
        """The requests for `path`."""
        return [request for request in self.requests if request.path == path]

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection, one request."""
        try:
            async with stream:
                request = await _read(stream)
                if request is None:
                    return
                self.requests.append(request)
                handler = self.routes.get(f"{request.method} {request.path}", not_found)
                if isinstance(handler, list):
                    handler = handler.pop(0) if handler else not_found
                await handler(request, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@asynccontextmanager
async def serving(path: str | None = None) -> AsyncIterator[Server]:
    """A server on a free port of the loopback, or on a Unix socket at `path`."""
    if path is None:
        listeners: list[Any] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        base_url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    else:
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await sock.bind(path)
        sock.listen()
        listeners = [trio.SocketListener(sock)]
        base_url = f"unix:{path}"
    server = Server(base_url)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        yield server
        nursery.cancel_scope.cancel()


async def _read(stream: trio.abc.Stream) -> Request | None:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = await stream.receive_some()
        if not piece:
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += await stream.receive_some()
    path, _, query = target.partition("?")
    return Request(method, path, parse_qsl(query), headers, head + b"\r\n\r\n", body)


async def send_head(stream: trio.abc.Stream, status: int, **headers: str) -> None:
    """The head of an answer that ends with the connection."""
    lines = [f"HTTP/1.1 {status} Whatever", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    await stream.send_all("\r\n".join([*lines, "", ""]).encode())


def answer(value: object, status: int = 200, /, **headers: str) -> Handler:
    """A handler that answers with JSON."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        body = msgspec.json.encode(value) if status != 204 else b""
        await send_head(stream, status, Content_Length=str(len(body)), **headers)
        await stream.send_all(body)

    return handler


def problem(status: int, code: str, detail: str, **members: str) -> Handler:
    """A handler that answers with an error."""
    body = {"type": f"urn:volant:error:{code}", "title": "Title", "status": status, "detail": detail, **members}
    return answer(body, status, Content_Type="application/problem+json")


not_found = problem(404, "not-found", "there is nothing here")


def sse(*blocks: str, stay: bool = False) -> Handler:
    """A handler that sends these blocks of events and breaks off, or stays silent."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        await send_head(stream, 200, Content_Type="text/event-stream")
        for block in blocks:
            await stream.send_all(block.encode() + b"\n\n")
        if stay:
            await trio.sleep_forever()

    return handler


def event(seq: int, kind: str = "VM_RUNNING", status: str | None = "running", **members: object) -> str:
    """The block of one event."""
    body = {"type": kind, "id": f"e-{seq}", "name": "demo", "vm_id": 7, "status": status, "ip_address": ""}
    body |= {"timestamp": "2025-09-24T12:34:56Z", "message": f"message {seq}", **members}
    return f"id: e-{seq}\nevent: {kind}\ndata: {msgspec.json.encode(body).decode()}"


def websocket(*messages: object, code: int | None = 1000, stay: bool = False) -> Handler:
    """A handler that upgrades, sends these as JSON, and closes with `code`; None breaks off."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        socket = WSConnection(ConnectionType.SERVER)
        socket.receive_data(request.head)
        list(socket.events())
        await stream.send_all(socket.send(AcceptConnection()))
        for message in messages:
            await stream.send_all(socket.send(TextMessage(msgspec.json.encode(message).decode())))
        if stay:
            await stream.send_all(socket.send(Ping()))
            await trio.sleep_forever()
        if code is not None:
            await stream.send_all(socket.send(CloseConnection(code)))

    return handler


def log_line(seq: int, line: str = "text", **members: object) -> dict[str, object]:
    """A line of a log."""
    return {
        "name": "demo",
        "vm_id": 7,
        "stream": "console",
        "line": line,
        "timestamp": "2025-09-24T12:34:56Z",
        "seq": seq,
        **members,
    }


def vm(**members: object) -> dict[str, object]:
    """A VM as the API shows it."""
    return {
        "id": 7, "name": "demo", "status": "running", "desired": "running", "reason": None, "plugin": "base",
        "runtime": "base", "pid": 4242, "ip_address": "", "mac_address": "", "cpu_cores": 1, "memory_mb": 256,
        "kernel_cmdline": "", "serial_socket": None, "labels": {}, "hypervisor": "qemu", "accelerator": "tcg",
        "restart_policy": "never", "restarts": 0, "boots": 1, "boot": "auto", "booted_from": "cold",
        "fallback": None, "disk": "none", "created_at": "2025-09-24T12:34:56Z",
        "updated_at": "2025-09-24T12:34:56Z", "started_at": "2025-09-24T12:34:56Z", "origin": None,
        "disk_mb": None, "network": "none", "network_reason": "", "ports": [], "workload": None,
        "expires_at": None, "warnings": [], "unreachable": None,
        "failover": "never", "replicate": None, "replica": None, "move": None,
        "placement": None,
        "volumes": [],
        "disk_iops": None, "disk_mbps": None,
        "image": None, "secrets": [], "egress": "all", "project": "default", **members,
    }  # fmt: skip


def ndjson(*pieces: bytes) -> Handler:
    """A handler that sends these bytes one after the other and ends."""

    async def handler(request: Request, stream: trio.abc.Stream) -> None:
        del request
        await send_head(stream, 200, Content_Type="application/x-ndjson")
        for piece in pieces:
            await stream.send_all(piece)
            await trio.lowlevel.checkpoint()

    return handler
