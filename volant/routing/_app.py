"""The app for the other hosts of the fleet: the app for clients, with the caller that the other host reports; and
tickets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from volant.fleet import CALLER, REDEEM, WantRedeemed, forwarded_in
from volant.http import JSON, AsgiApp, new_request_id, problem_body
from volant.model import Caller, Problem

_MAX_BODY = 4 * 1024 * 1024
Handler = Callable[[bytes], Awaitable[bytes]]
"""Answers requests between hosts: receives a body and returns one. Raises Problem."""


class FromHosts:
    """Serves requests of other hosts, which have presented a certificate of the fleet."""

    def __init__(
        self, app: AsgiApp, redeem: Callable[[bytes, str], Caller | None], handlers: Mapping[str, Handler]
    ) -> None:
        """Creates it. `redeem` uses up a ticket of this host for a path, and returns its caller; `handlers` are by
        their paths."""
        self._app = app
        self._redeem = redeem
        self._handlers = {**handlers, REDEEM: self._answer_ticket}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            # The app's own is that of its other server.
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        handler = self._handlers.get(scope["path"]) if scope["type"] == "http" else None
        if handler is not None:
            await _answer(handler, scope, receive, send)
            return
        try:
            forwarded = forwarded_in(scope["headers"])
        except Problem as problem:
            await _refuse(scope, send, problem)
            return
        state = scope["state"]
        state["forwarded"], state["credential"] = forwarded.caller, forwarded.credential
        state["address"] = forwarded.address
        scope["headers"] = [field for field in scope["headers"] if field[0] != CALLER]
        await self._app(scope, receive, send)

    async def _answer_ticket(self, body: bytes) -> bytes:
        try:
            wanted = msgspec.json.decode(body, type=WantRedeemed)
            caller = self._redeem(wanted.ticket.encode("latin-1"), wanted.path)
        except (msgspec.MsgspecError, ValueError):
            caller = None
        return msgspec.json.encode(caller)


async def _answer(handler: Handler, scope: Any, receive: Any, send: Any) -> None:
    pieces, size, more = [], 0, True
    while more and size <= _MAX_BODY:
        message = await receive()
        if message["type"] != "http.request":
            return
        pieces.append(message["body"])
        size += len(message["body"])
        more = message["more_body"]
    try:
        if more:
            raise Problem(413, "body-too-large", f"a request between hosts has at most {_MAX_BODY} bytes")
        answer = await handler(b"".join(pieces))
    except Problem as problem:
        await _refuse(scope, send, problem)
        return
    headers = [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer, "more_body": False})


async def _refuse(scope: Any, send: Any, problem: Problem) -> None:
    body = problem_body(problem, new_request_id())
    prefix = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
    await send({"type": f"{prefix}.start", "status": problem.status, "headers": headers})
    await send({"type": f"{prefix}.body", "body": body, "more_body": False})
