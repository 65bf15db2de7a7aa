"""A request that is served without Quart: a stream in either direction, or a WebSocket.

Quart buffers request bodies without back-pressure, converts an empty WebSocket message to None (quart-trio 0.12), and
runs streams as async generators, in which a cancel scope may not span a `yield`. A stream is therefore a plain
coroutine on ASGI's own `receive` and `send`, with these helpers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec
import trio

from volant.model import Caller, Cause, Key, Problem

from ._addresses import PortOrigin
from ._bodies import Share
from ._ending import Ending
from ._problems import problem_body, problem_headers
from ._project import listed_project, one_project
from ._query import Query


def has_etag(given: Iterable[str], etag: str) -> bool:
    """Returns whether the lines of `If-None-Match` contain an `ETag`, so that the client's copy is current."""
    return any(tag.strip().removeprefix("W/") in ("*", etag) for line in given for tag in line.split(","))


Message = dict[str, Any]
Header = tuple[bytes, bytes]

NORMAL = 1000


class Piece:
    """A piece of a body for many clients, framed once for all of them."""

    __slots__ = ("chunk", "data")

    def __init__(self, data: bytes) -> None:
        """Frames `data`, which must not be empty."""
        self.data = data
        self.chunk = b"%x\r\n%b\r\n" % (len(data), data)
        """`data` as a chunk (RFC 9112, 7.1)."""


class Call(msgspec.Struct):
    """A request, and methods to answer it."""

    scope: Any
    receive: Callable[[], Awaitable[Message]]
    send: Callable[[Message], Awaitable[None]]
    request_id: str
    body: Share
    """The part of the budget for JSON bodies that its body uses, if it is held in memory."""
    args: Sequence[str] = ()
    """The groups that the route's pattern matched, percent-decoded."""
    caller: Caller | None = None
    """The caller; None until it is known."""
    port_origin: PortOrigin | None = None
    """The port of a VM, if the request is at the origin of one."""
    cause: Cause | None = None
    """The record of the request; None if there is none, or not yet."""
    started: bool = False
    """Whether the head of the answer has been sent."""

    @property
    def is_websocket(self) -> bool:
        return bool(self.scope["type"] == "websocket")

    @property
    def method(self) -> str:
        return "GET" if self.is_websocket else str(self.scope["method"])

    @property
    def stopping(self) -> Ending:
        """An event that is set when the daemon stops or the caller's credentials end. Streams then end themselves."""
        ending = self.scope["state"]["stopping"]
        assert isinstance(ending, Ending)
        return ending

    @property
    def project(self) -> str:
        """The project in which names are looked up. :raises Problem: 400, the caller asks for all projects."""
        return one_project(self.scope)

    def named(self, name: str) -> Key:
        """Returns the key of a name in the project. :raises Problem: see `project`."""
        return Key(self.project, name)

    @property
    def listed(self) -> str | None:
        """The project whose objects are listed; None for all projects."""
        return listed_project(self.scope)

    def query(self, *, credentials: bool) -> Query:
        """Returns the query's parameters. `credentials` allows `api_key` and `ticket`."""
        return Query(self.scope["query_string"], credentials=credentials)

    def header(self, name: bytes) -> str | None:
        """Returns the value of a header, by its name in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value).decode("latin-1")
        return None

    # HTTP

    async def receive_counted(self) -> Message:
        """Receives like `receive`, for handlers that keep the whole body. :raises Problem: 503, the budget is used
        up."""
        message = await self.receive()
        if message["type"] == "http.request":
            self.body.take(len(message["body"]))
        return message

    async def start(self, status: int, headers: Sequence[Header]) -> None:
        """Sends the head of an answer at once, as the body may follow much later."""
        self.started = True
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": list(headers),
                "volant.at_once": True,
            }
        )

    async def write(self, data: bytes) -> None:
        """Sends a piece of the body; returns when the kernel has it."""
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def write_piece(self, piece: Piece) -> None:
        """Sends a piece like `write`, for an answer that began without a `Content-Length`."""
        await self.send(
            {"type": "http.response.body", "body": piece.data, "more_body": True, "volant.chunk": piece.chunk}
        )

    async def finish(self) -> None:
        """Ends the body."""
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, problem: Problem, headers: Sequence[Header] = ()) -> None:
        """Answers with an error, over HTTP or instead of an upgrade, before anything else was sent."""
        # Its traceback refers to frames that refer to this call, which then only the garbage collector would free.
        self.scope["state"]["problem"] = problem.with_traceback(None)
        body = problem_body(problem, self.request_id)
        await self.reject(problem.status, [*problem_headers(body, self.request_id), *headers], body)

    async def reject(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """Sends a whole answer, over HTTP or instead of an upgrade."""
        prefix = "websocket.http.response" if self.is_websocket else "http.response"
        self.started = True
        await self.send({"type": f"{prefix}.start", "status": status, "headers": list(headers)})
        await self.send({"type": f"{prefix}.body", "body": body, "more_body": True})
        await self.send({"type": f"{prefix}.body", "body": b"", "more_body": False})

    async def while_connected(self, stream: Callable[[], Awaitable[object]]) -> bool:
        """Runs `stream` until it ends or the client disconnects, and drops input of the client. Returns whether it
        ended."""
        ended = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while (await self.receive())["type"] not in ("http.disconnect", "websocket.disconnect"):
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await stream()
            ended = True
            nursery.cancel_scope.cancel()
        return ended

    # WebSockets

    async def accept(self) -> None:
        """Completes the upgrade."""
        self.started = True
        await self.send({"type": "websocket.accept", "headers": []})

    async def send_bytes(self, data: bytes) -> None:
        """Sends one binary message."""
        await self.send({"type": "websocket.send", "bytes": data})

    async def send_texts(self, texts: Sequence[bytes]) -> None:
        """Sends text messages, each UTF-8, with one write."""
        await self.send({"type": "volant.websocket.texts", "texts": texts})

    async def close(self, code: int, reason: str = "") -> None:
        """Sends the closing frame."""
        await self.send({"type": "websocket.close", "code": code, "reason": reason})
