"""The middleware of every request: its id, access control, routing, errors as problems, the log line.

It wraps Quart as ASGI, so it also answers for what Quart does not see, and costs a request that goes to Quart a few
microseconds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import unquote

import msgspec
import trio

from volant.model import Problem, current_caller

from ._access import Access
from ._bodies import Bodies
from ._call import Call, Header, Message
from ._limits import Limits
from ._problems import new_request_id, too_large

_requests = logging.getLogger("volant.api.request")
_log = logging.getLogger("volant.api")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_OF_VM = re.compile(r"/(?:api|ws)/v1/vms/([a-z0-9-]{1,63})(?:/|\Z)")
_QUIET = frozenset({"/healthz"})
_ANY = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""The methods in `Allow` of a route that takes nearly any."""

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]
Handler = Callable[[Call], Awaitable[None]]


class StreamRoute(msgspec.Struct, frozen=True):
    """A route that is served without Quart. `methods` None: any but TRACE."""

    pattern: re.Pattern[str]
    handler: Handler
    methods: frozenset[str] | None = frozenset({"GET", "HEAD"})
    http: bool = True
    websocket: bool = False
    sse: bool = False
    """Whether it is always an event stream; other routes are one only for clients that accept nothing else."""
    key_in_query: bool = False
    """Whether the URL may carry the key, as a WebSocket's may, for clients that have nothing but the URL."""


class Middleware:
    """The ASGI app that is served."""

    def __init__(
        self,
        app: AsgiApp,
        routes: Sequence[StreamRoute],
        access: Access,
        limits: Limits,
        authorize: Callable[[str | None, str, str], None],
    ) -> None:
        """:param authorize: takes the caller, the method and the path; raises a Problem where that is not allowed"""
        self._app = app
        self._authorize = authorize
        self._routes = routes
        self._access = access
        self._limits = limits
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode("ascii") if _REQUEST_ID.match(given) else new_request_id()
        scope["state"]["request_id"] = request_id
        answer = _Answer(send, request_id.encode("ascii"), self._access.cors(scope))
        call = Call(scope, receive, answer.send, request_id, self._bodies.share())
        began = trio.current_time()
        try:
            await self._serve(call)
        except* trio.BrokenResourceError:
            pass  # One of the two sides disconnected in the middle; no answer would arrive.
        except* Problem as group:
            await self._fail(call, answer, first_problem(group))
        except* Exception as group:
            _log.error("request %s failed", request_id, exc_info=group, extra={"request_id": request_id})
            await self._fail(call, answer, internal_error())
        finally:
            call.body.release()
            caller = call.caller or self._access.client(scope)
            _log_request(scope, caller, request_id, answer.status, trio.current_time() - began)

    async def _serve(self, call: Call) -> None:
        scope = call.scope
        self._access.check(scope)
        allowed = self._access.preflight(scope)
        if allowed is not None:
            await call.reject(204, allowed, b"")
            return
        path = scope["raw_path"].decode("ascii")
        route, args = self._find(path)
        scope["state"]["caller"] = self._access.authenticate(scope, in_query=_takes_credentials_in_query(call, route))
        call.caller = caller_text(self._access.client(scope), scope["state"]["caller"])
        current_caller.set(call.caller)
        # What no stream takes is routed by its decoded path, so that is the one to judge.
        self._authorize(scope["state"]["caller"], call.method, path if route is not None else scope["path"])
        if route is not None:
            call.args = args
            self._check_method(route, call)
            await route.handler(call)
            return
        if call.is_websocket:
            raise Problem(404, "not-found", f"there is no WebSocket at {path[:200]}")
        self._check_length(call)
        await self._app(scope, call.receive_counted, call.send)

    def _find(self, path: str) -> tuple[StreamRoute | None, Sequence[str]]:
        for route in self._routes:
            found = route.pattern.match(path)
            if found:
                return route, [unquote(group or "") for group in found.groups()]
        return None, ()

    def _check_method(self, route: StreamRoute, call: Call) -> None:
        if call.is_websocket and not route.websocket:
            raise Problem(404, "not-found", "there is no WebSocket here", hint="this is plain HTTP")
        # TRACE would show a page what its browser sends, and has no use here (RFC 9110, 9.3.8).
        if call.method == "TRACE" or (route.methods is not None and call.method not in route.methods):
            allowed = ", ".join(sorted(route.methods or _ANY))
            raise Problem(405, "method-not-allowed", f"{call.method} is not possible here", hint=f"use {allowed}")
        if not call.is_websocket and not route.http:
            raise Problem(426, "upgrade-required", "this is a WebSocket", hint="connect with ws://")

    def _check_length(self, call: Call) -> None:
        """Refuses a body whose `Content-Length` is too large, before `100 Continue` is sent."""
        length = call.header(b"content-length")
        if length is not None and int(length) > self._limits.json_body:
            raise too_large(self._limits.json_body)

    async def _fail(self, call: Call, answer: _Answer, problem: Problem) -> None:
        if answer.status:
            return  # Too late: the server sees an unfinished answer, and cuts the connection.
        headers = []
        if problem.status == 401:
            headers.append((b"www-authenticate", b'Bearer realm="volant"'))
        if problem.status == 405 and problem.hint:
            headers.append((b"allow", problem.hint.removeprefix("use ").encode("latin-1")))
        if problem.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % problem.retry_after_s))
        if problem.status == 426:
            headers.append((b"upgrade", b"websocket"))
        await call.fail(problem, headers)


class _Answer:
    """Adds the headers of every answer, and remembers its status."""

    __slots__ = ("_cors", "_request_id", "_send", "status")

    def __init__(self, send: Callable[[Message], Awaitable[None]], request_id: bytes, cors: Sequence[Header]) -> None:
        self._send = send
        self._request_id = request_id
        self._cors = cors
        self.status = 0

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = message["headers"]
            headers.extend(self._cors)
            names = {name for name, _ in headers}
            if b"cross-origin-resource-policy" not in names:
                headers.append((b"cross-origin-resource-policy", b"same-origin"))
            if b"x-request-id" not in names:
                headers.append((b"x-request-id", self._request_id))
                headers.append((b"x-content-type-options", b"nosniff"))
        elif kind in ("websocket.accept", "volant.websocket.switch"):
            self.status = 101
        await self._send(message)


def _takes_credentials_in_query(call: Call, route: StreamRoute | None) -> bool:
    """Browsers can't set headers for a WebSocket and an `EventSource`, and for those alone a URL may carry a key."""
    if call.is_websocket or (route is not None and route.key_in_query):
        return True
    if route is None or call.method not in ("GET", "HEAD"):
        return False
    return route.sse or (call.header(b"accept") or "").strip().lower() == "text/event-stream"


def internal_error() -> Problem:
    """Returns the 500 for a bug, which shows nothing but where to look."""
    return Problem(
        500, "internal-error", "the request failed inside the daemon", hint="its log has the details under request_id"
    )


def first_problem(group: BaseExceptionGroup[Problem]) -> Problem:
    """Returns the first problem of a group that holds nothing else."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Problem)
    return error


def caller_text(client: str, caller: str | None) -> str:
    """Returns the caller for logs: address, or user at a Unix socket, and the first digits of its key's digest."""
    # A reader of the log could search for a key with that digest. So only 32 bits are shown: enough to tell keys apart,
    # too few to confirm a guess.
    return f"{client} key {caller[:8]}" if caller is not None and _DIGEST.match(caller) else client


def _log_request(scope: Any, caller: str, request_id: str, status: int, took_s: float) -> None:
    path = scope["raw_path"].decode("ascii", "replace")
    level = logging.DEBUG if path in _QUIET else logging.INFO
    if _requests.isEnabledFor(level):
        # Never the query: it may carry a key.
        method = scope.get("method", "WEBSOCKET")
        text, took_ms = path[:500], took_s * 1000
        named = _OF_VM.match(path)
        facts = {"request_id": request_id, "vm": named[1] if named else None, "caller": caller}
        _requests.log(
            level, "%s %s %s %s from %s %.1f ms", request_id, method, text, status or "-", caller, took_ms, extra=facts
        )
