"""A server on a free loopback port, and clients that speak bytes, as no well-behaved library would."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11
import trio

from volant.api._limits import Limits
from volant.api._serving import serve

FAST = Limits(
    keep_alive_s=30.0, header_s=5.0, send_s=20.0, finish_s=3.0, drop_s=2.0, linger_s=0.5, grace_s=0.3, lifespan_s=2.0
)


@dataclass
class Running:
    """A server under test."""

    port: int
    stopping: trio.Event
    stopped: trio.Event

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def stop(self, within_s: float) -> float:
        """Order the stop; how long it took."""
        started = trio.current_time()
        self.stopping.set()
        with trio.fail_after(within_s):
            await self.stopped.wait()
        return trio.current_time() - started

    async def ask(self, request: bytes) -> Answer:
        """Send bytes on a connection of their own, read one answer."""
        async with await self.connect() as stream:
            await stream.send_all(request)
            return await read_answer(stream)

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask(request("GET", path, **headers))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    all_headers: list[tuple[str, str]]


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    fields = {"Host": "127.0.0.1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body is not None:
        fields.setdefault("Content-Length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + (body or b"")


async def read_answer(stream: trio.abc.ReceiveStream, method: str = "GET", within_s: float = 10.0) -> Answer:
    """One answer; leaves the stream open. Interim answers are skipped."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    body = b""
    head: h11.Response | None = None
    with trio.fail_after(within_s):
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                break
    assert head is not None
    fields = [(name.decode(), value.decode()) for name, value in head.headers]
    return Answer(head.status_code, dict(fields), body, fields)


async def read_head(stream: trio.abc.ReceiveStream) -> tuple[bytes, bytes]:
    """The head of an answer, and what came after it."""
    data = b""
    with trio.fail_after(10):
        while b"\r\n\r\n" not in data:
            chunk = await stream.receive_some(65536)
            assert chunk, data
            data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


async def read_to_end(stream: trio.abc.ReceiveStream, within_s: float = 10.0) -> bytes:
    data = b""
    with trio.fail_after(within_s):
        while chunk := await stream.receive_some(65536):
            data += chunk
    return data


@asynccontextmanager
async def running(app: Callable[..., Any], limits: Limits = FAST) -> AsyncIterator[Running]:
    """Serve `app`. Fails when the server ended by itself, or does not stop."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        server = Running(listener.getsockname()[1], trio.Event(), trio.Event())

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await serve(app, [listener], stopping=server.stopping, limits=limits, task_status=task_status)
            server.stopped.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield server
            assert server.stopping.is_set() or not server.stopped.is_set(), "the server ended by itself"
            server.stopping.set()
            with trio.fail_after(5):
                await server.stopped.wait()


def bare(handler: Callable[..., Any]) -> Callable[..., Any]:
    """An ASGI app without a framework, whose every request `handler` serves."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await handler(scope, receive, send)
            return
        for step in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{step}.complete"})

    return app
