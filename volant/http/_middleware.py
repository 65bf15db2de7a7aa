"""The middleware of every request: its id, access control, routing, errors as problems, the log line.

It wraps Quart as ASGI, so it also answers requests that Quart does not see, and costs a few microseconds for a request
to Quart.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import msgspec
import trio

from volant.model import ANONYMOUS, Caller, CallerEnded, Cause, Problem, current_cause

from ._access import Access
from ._addresses import PortOrigin
from ._bodies import Bodies
from ._call import Call, Header, Message
from ._problems import new_request_id, too_large
from ._project import choose_project
from ._settings import Limits

_requests = logging.getLogger("volant.api.request")
_log = logging.getLogger("volant.api")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}\Z")
_OF_VM = re.compile(r"/(?:api|ws)/v1/vms/([a-z0-9-]{1,63})(?:/|\Z)")
_QUIET = frozenset({"/healthz"})
_QUIET_BELOW = "/console/"
"""The prefix of the page's files, whose requests are not logged as there are some thirty of them."""
_ANY = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""The methods in `Allow` of a route that accepts nearly any."""

_FIRST = frozenset(
    {"http.response.start", "websocket.http.response.start", "websocket.accept", "volant.websocket.switch"}
)
"""The messages that begin an answer."""

Op = TypeVar("Op")
Contra = TypeVar("Contra", contravariant=True)


class Admission(Protocol[Op]):
    """Admission of requests by their operations."""

    def find(self, call: Call, path: str) -> Op | None:
        """Returns the operation of a request, by its routed path."""

    def cause(self, call: Call, path: str, operation: Op | None) -> Cause | None:
        """Returns the cause of a request for its records; None if it only reads."""

    def rejected(self, call: Call, caller: Caller) -> Cause:
        """Returns the cause of a request whose caller is known but rejected."""

    def check(self, caller: Caller, operation: Op | None) -> None:
        """Checks the permission. :raises Problem: 403, the caller lacks it."""

    async def answer(self, cause: Cause, problem: Problem | None) -> None:
        """Records the outcome before the request is answered. :raises Problem: 503, it can't be recorded."""


class Router(Protocol[Contra]):
    """Routes requests to other hosts."""

    @property
    def header(self) -> Header:
        """Returns a header that is added to each answer of this host."""

    async def route(self, call: Call, operation: Contra | None, path: str) -> bool:
        """Answers a request through another host, if that is responsible. Returns whether it was. :raises Problem: the
        other host failed."""


class Ports(Protocol):
    """Access to the origins of ports in guests."""

    async def enter(self, call: Call, origin: PortOrigin) -> bool:
        """Rewrites a request at the origin of a port to the daemon's path of that port, and sets its caller. Returns
        False if it has answered the request itself.

        :raises Problem: 401, the request has no grant; 404, there is no such VM
        """


AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]
Handler = Callable[[Call], Awaitable[None]]


class StreamRoute(msgspec.Struct, frozen=True):
    """A route that is served without Quart. With `methods` None it accepts any but TRACE."""

    pattern: re.Pattern[str]
    handler: Handler
    methods: frozenset[str] | None = frozenset({"GET", "HEAD"})
    http: bool = True
    websocket: bool = False
    sse: bool = False
    """Whether it is always an event stream. Other routes are event streams only for clients that accept nothing
    else."""
    key_in_query: bool = False
    """Whether the URL may contain the key, as for a WebSocket, for clients that can only set the URL."""
    query_is_guests: bool = False
    """Whether the query belongs to a guest, so that `project` in it is not the daemon's."""


class Middleware:
    """The ASGI app that is served."""

    def __init__(
        self,
        app: AsgiApp,
        routes: Sequence[StreamRoute],
        access: Access,
        limits: Limits,
        admission: Admission[Any],
        ports: Ports,
        router: Router[Any] | None = None,
    ) -> None:
        """Creates the app. `router` is None if there are no other hosts."""
        self._ports = ports
        self._app = app
        self._router = router
        self._admission = admission
        self._routes = routes
        self._access = access
        self._limits = limits
        self._bodies = Bodies(limits)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._access.running.stop_with, scope["state"]["stopping"])
                nursery.start_soon(self._access.sessions.keep)
                await self._app(scope, receive, send)
                nursery.cancel_scope.cancel()
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given.decode("ascii") if _REQUEST_ID.match(given) else new_request_id()
        scope["state"]["request_id"] = request_id
        added = self._access.cors(scope)
        if self._router is not None:
            added = [*added, self._router.header]
        answer = _Answer(send, request_id.encode("ascii"), added, self._admission)
        call = answer.call = Call(scope, receive, answer.send, request_id, self._bodies.share())
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
            answer.call = None  # Each refers to the other one; so both are freed now.
            caller = call.caller or self._access.client(scope)
            _log_request(scope, str(caller), request_id, answer.status, trio.current_time() - began)

    async def _serve(self, call: Call) -> None:
        scope = call.scope
        standing = scope["state"].get("standing")
        if standing is not None and standing.let_in is None:
            standing.let_in = False
        call.port_origin = self._access.check(scope)
        if call.port_origin is not None:
            if not await self._ports.enter(call, call.port_origin):
                return
            route, args = self._find(scope["raw_path"].decode("ascii"))
        else:
            allowed = self._access.preflight(scope)
            if allowed is not None:
                await call.reject(204, allowed, b"")
                return
            route, args = self._find(scope["raw_path"].decode("ascii"))
            call.caller = await self._authenticate(call, route)
        caller = call.caller
        assert caller is not None
        scope["state"]["caller"] = caller
        if standing is not None and (caller.id != ANONYMOUS or not self._access.asks_for_key):
            standing.let_in = True
        path = scope["raw_path"].decode("ascii")
        # Other requests than streams are routed by the decoded path, so that path is checked.
        routed = path if route is not None else scope["path"]
        use, limits = self._access.use, self._access.caller_limits
        call.body.belongs_to(caller, use, limits)
        # First of all, so that a flood of requests leaves no flood of records.
        use.take_request(caller, limits)
        try:
            await self._admit(call, caller, routed, route, args)
        finally:
            use.give_back_request(caller)

    async def _authenticate(self, call: Call, route: StreamRoute | None) -> Caller:
        in_query = _takes_credentials_in_query(call, route)
        await self._access.prepare(call.scope, in_query=in_query)
        try:
            return self._access.authenticate(call.scope, in_query=in_query)
        except CallerEnded as ended:
            call.caller = ended.caller
            call.cause = self._admission.rejected(call, ended.caller)
            raise

    async def _admit(
        self, call: Call, caller: Caller, routed: str, route: StreamRoute | None, args: Sequence[str]
    ) -> None:
        scope = call.scope
        operation = self._admission.find(call, routed)
        scope["state"]["operation"] = operation
        cause = call.cause = self._admission.cause(call, routed, operation)
        current_cause.set(cause)
        choose_project(scope, caller.project, in_query=route is None or not route.query_is_guests)
        if cause is not None:
            cause.project = call.listed
        self._admission.check(caller, operation)
        with self._access.running.add(caller, scope["state"]["stopping"]) as ending:
            scope["state"]["stopping"] = ending
            with ending.scope:
                if self._router is None or not await self._router.route(call, operation, routed):
                    await self._carry_out(call, route, args)
        if ending.scope.cancelled_caught:
            raise ending.problem()

    async def _carry_out(self, call: Call, route: StreamRoute | None, args: Sequence[str]) -> None:
        scope = call.scope
        if route is not None:
            call.args = args
            self._check_method(route, call)
            await route.handler(call)
            return
        if call.is_websocket:
            path = scope["raw_path"].decode("ascii")
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
    """Records answers that need a record, adds headers, and remembers the status."""

    __slots__ = ("_added", "_admission", "_request_id", "_send", "call", "status")

    def __init__(
        self,
        send: Callable[[Message], Awaitable[None]],
        request_id: bytes,
        added: Sequence[Header],
        admission: Admission[Any],
    ) -> None:
        self.call: Call | None = None
        self._admission = admission
        self._send = send
        self._request_id = request_id
        self._added = added
        self.status = 0

    async def send(self, message: Message) -> None:
        """Sends a part of the answer. :raises Problem: 503 before the first part, it can't be recorded."""
        kind = message["type"]
        call = self.call
        if call is not None and call.cause is not None and kind in _FIRST:
            await self._admission.answer(call.cause, call.scope["state"].get("problem"))
        if kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = message["headers"]
            names = {name for name, _ in headers}
            # Answers of other hosts already have these headers. A `Vary` is added to another one (RFC 9110, 12.5.5).
            headers.extend(field for field in self._added if field[0] == b"vary" or field[0] not in names)
            if b"cross-origin-resource-policy" not in names:
                headers.append((b"cross-origin-resource-policy", b"same-origin"))
            if b"x-request-id" not in names:
                headers.append((b"x-request-id", self._request_id))
                # At an origin of its own, a guest says how its types are to be read.
                if call is None or call.port_origin is None:
                    headers.append((b"x-content-type-options", b"nosniff"))
        elif kind in ("websocket.accept", "volant.websocket.switch"):
            self.status = 101
        await self._send(message)


def _takes_credentials_in_query(call: Call, route: StreamRoute | None) -> bool:
    """Returns whether credentials may be in the query: only for WebSockets and `EventSource`, where browsers can't set
    headers."""
    if call.is_websocket or (route is not None and route.key_in_query):
        return True
    if route is None or call.method not in ("GET", "HEAD"):
        return False
    return route.sse or (call.header(b"accept") or "").strip().lower() == "text/event-stream"


def internal_error() -> Problem:
    """Returns the 500 for a bug, which only shows where to look."""
    return Problem(
        500, "internal-error", "the request failed inside the daemon", hint="its log has the details under request_id"
    )


def first_problem(group: BaseExceptionGroup[Problem]) -> Problem:
    """Returns the first problem of a group that contains only problems."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Problem)
    return error


def _log_request(scope: Any, caller: str, request_id: str, status: int, took_s: float) -> None:
    path = scope["raw_path"].decode("ascii", "replace")
    level = logging.DEBUG if path in _QUIET or path.startswith(_QUIET_BELOW) else logging.INFO
    if _requests.isEnabledFor(level):
        # Never the query: it may carry a key.
        method = scope.get("method", "WEBSOCKET")
        text, took_ms = path[:500], took_s * 1000
        named = _OF_VM.match(path)
        facts = {"request_id": request_id, "vm": named[1] if named else None, "caller": caller}
        _requests.log(
            level, "%s %s %s %s from %s %.1f ms", request_id, method, text, status or "-", caller, took_ms, extra=facts
        )
