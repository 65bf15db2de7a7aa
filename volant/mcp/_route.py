"""`POST /api/v1/mcp`: the Model Context Protocol server, and the API's own commands.

The official `mcp` package implements the protocol in both its generations: 2026-07-28, where each request is
independent, and the older versions that begin with `initialize`. The older versions have no sessions here either: no
tool needs one, anonymous clients could fill memory with them, and a client would lose its session when the daemon
restarts. So a request is just a task of its connection. It gets its own session manager of the package, which can run
only once, owns the tasks of the request, and ends with it. GET and DELETE, which are for sessions, are 405, as both
generations allow.

This module reads the body first, to distinguish the two forms and to limit it, and detects when the client disconnects.
The package takes half a second to import, so the first request that needs it imports it, in a thread.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from volant.http import Call, Limits, Message, StreamRoute, not_json, read_call_bytes
from volant.model import Permission, Problem, invalid
from volant.operations import TABLE, Answer, ApiDeps, OneOf, Table

from ._commands import Command, CommandAnswer, RpcAnswer, RpcMessage, answer_command
from ._tool import ToolCall

if TYPE_CHECKING:
    from ._server import McpServer

_PATH = re.compile(r"/api/v1/mcp/?\Z")
_JSON = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]

_encoder = msgspec.json.Encoder()


class _Members(msgspec.Struct):
    """The members of a body that show which form it has."""

    command: Any = msgspec.UNSET
    jsonrpc: Any = msgspec.UNSET
    method: Any = msgspec.UNSET
    id: Any = msgspec.UNSET


_members = msgspec.json.Decoder(_Members)


TABLE.declare(
    "POST /api/v1/mcp",
    "mcp",
    Permission.VIEW,
    "Use the Model Context Protocol, or send one of the API's own commands",
    answers={
        200: Answer("The answer to a request, or to a command", OneOf((RpcAnswer, CommandAnswer)), streams=True),
        202: Answer("A notification or an answer was accepted"),
        **{status: Answer("The protocol's own errors", RpcAnswer) for status in (400, 404, 406, 413, 415)},
    },
    body=OneOf((RpcMessage, Command)),
    examples={
        "MCP": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        "A command": {"command": "volant.vms.list", "params": {"status": ["running"]}},
    },
    errors=(404, 406, 503),
    details="Streamable HTTP without sessions: version 2026-07-28, where each request has the headers "
    "`MCP-Protocol-Version` and `Mcp-Method`, and the versions that begin with `initialize`. An object with `command` "
    "and without `jsonrpc` is a command; its failures are answered with 200 and `error`.",
)


def routes(deps: ApiDeps, limits: Limits, table: Table) -> list[StreamRoute]:
    """Returns the routes of this resource."""
    server: McpServer | None = None
    loading = trio.Lock()

    async def loaded() -> McpServer:
        nonlocal server
        async with loading:
            if server is None:
                server = await deps.host.threads.run(_load, deps, table)
        return server

    async def mcp(call: Call) -> None:
        call.query(credentials=False).done()
        content_type = (call.header(b"content-type") or "").partition(";")[0].strip().lower()
        if content_type and content_type != "application/json":
            raise not_json(content_type)
        if not content_type:
            # A missing type means JSON, as on all routes; the package would refuse it.
            others = [field for field in call.scope["headers"] if field[0] != b"content-type"]
            call.scope["headers"] = [*others, _JSON[0]]
        body = await read_call_bytes(call, limits)
        serve = partial(_command, deps, table, body) if _is_command(call, body) else partial(_protocol, loaded, body)
        if await call.while_connected(partial(serve, call)):
            await call.finish()

    return [StreamRoute(_PATH, mcp, methods=frozenset({"POST"}))]


def _is_command(call: Call, body: bytes) -> bool:
    """Returns whether a body is one of the API's own commands, not a message of MCP.

    :raises Problem: 400 for an object that is neither, and for a request whose `id` is neither an integer nor text,
        which the package (mcp 2.3) would treat as a notification
    """
    try:
        members = _members.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if members.method is not msgspec.UNSET and not (members.id is msgspec.UNSET or type(members.id) in (int, str)):
        raise invalid("id", "id is neither an integer nor text", hint="a notification has none")
    if members.jsonrpc is not msgspec.UNSET or call.header(b"mcp-protocol-version") is not None:
        return False
    if members.command is msgspec.UNSET:
        raise Problem(
            400, "invalid-request", "the body is neither a message of the Model Context Protocol nor a command",
            hint='send an object with "jsonrpc": "2.0", or one with "command"',
        )  # fmt: skip
    if not isinstance(members.command, str):
        raise invalid("command", "command is not text")
    return True


async def _command(deps: ApiDeps, table: Table, body: bytes, call: Call) -> None:
    answer = _encoder.encode(await answer_command(ToolCall(deps=deps, scope=call.scope), table, body))
    await call.start(200, [*_JSON, (b"content-length", b"%d" % len(answer))])
    await call.write(answer)


async def _protocol(loaded: Callable[[], Awaitable[McpServer]], body: bytes, call: Call) -> None:
    accepts_json, accepts_stream = _accepts(call.header(b"accept"))
    if not accepts_json:
        raise Problem(
            406, "not-acceptable", "the client does not accept application/json",
            hint="send Accept: application/json, text/event-stream",
        )  # fmt: skip
    server = await loaded()
    replay = _Replay(body)

    async def send(message: Message) -> None:
        # The end of the body is sent last, by `finish`: after it, Hypercorn reports that the client has left.
        if message["type"] == "http.response.body":
            if message["body"]:
                await call.write(message["body"])
            return
        if message["status"] == 202:
            # There is no body, so no content type.
            message["headers"] = [field for field in message["headers"] if field[0] != b"content-type"]
        await call.send(message)

    await server.serve(call.scope, replay.receive, send, streams=accepts_stream)


def _accepts(header: str | None) -> tuple[bool, bool]:
    """Returns whether `Accept` allows JSON, and whether it allows event streams."""
    kinds = {kind.partition(";")[0].strip().lower() for kind in (header or "*/*").split(",")}
    anything = "*/*" in kinds
    return (
        anything or not kinds.isdisjoint({"application/json", "application/*"}),
        anything or not kinds.isdisjoint({"text/event-stream", "text/*"}),
    )


def _load(deps: ApiDeps, table: Table) -> McpServer:
    from ._server import McpServer

    return McpServer(deps, table)


class _Replay:
    """The ASGI `receive` of a body that was already read. It reports no disconnect: `while_connected` detects that."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body

    async def receive(self) -> Message:
        """Returns the body; the second call waits forever."""
        await trio.lowlevel.checkpoint()
        if self._body is None:
            await trio.sleep_forever()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
