"""The app: Quart for single answers, plain coroutines for streams, and one middleware around both."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import trio

from volant import agui, mcp, web
from volant.concurrency import Backoff, FairShare, dump_tasks, open_helpers
from volant.host import Host
from volant.http import JSON, AsgiApp, Call, Limits, Middleware, StreamRoute
from volant.model import Health, Problem
from volant.operations import TABLE, Admission, ApiDeps, Table
from volant.relay import Relay

from . import (
    _agent,
    _audit,
    _console,
    _devtools,
    _events,
    _files,
    _logs,
    _port_origins,
    _sign_in,
    _tcp,
)

_SOON_S = 1.0
"""The time within which the first probe of a supervisor is answered."""
_RETRY_MAX_S = 30.0
_RETRY_AFTER_S = 1


def create_app(deps: ApiDeps, limits: Limits | None = None, table: Table = TABLE) -> Middleware:
    """Returns the app that serves a table of operations, for `volant.http.serve`."""
    limits = limits or Limits()
    share = FairShare()
    relay = Relay(share)
    streams = [
        *_probes(deps),
        *_agent.routes(deps, relay),
        *_devtools.routes(deps, relay, share),
        *_events.routes(deps),
        *_audit.routes(deps),
        *_logs.routes(deps, share),
        *_console.routes(deps, share),
        *_tcp.routes(deps, share),
        *_files.routes(deps, limits),
        *_sign_in.routes(deps, limits),
        *web.routes(deps),
        *agui.routes(deps, limits),
        *mcp.routes(deps, limits, table),
    ]

    def single() -> AsgiApp:
        from ._quart import quart_app

        return quart_app(deps, limits, table)

    ports = _port_origins.PortOrigins(deps)
    admission = Admission(table, deps.recorder)
    router = None
    if deps.fleet is not None:
        from volant.fleet import TicketsOfOthers
        from volant.routing import Router

        deps.access.join(deps.fleet.host, TicketsOfOthers(deps.fleet.peers))
        router = Router(deps.fleet, deps.access, relay, limits, {"mcp": mcp.Subjects(table).of})
    return Middleware(_Late(deps.host, single), streams, deps.access, limits, admission, ports, router)


def _probes(deps: ApiDeps) -> list[StreamRoute]:
    """Returns `/healthz` and `/api/v1/system/tasks`, which answer without Quart, as supervisors wait for them."""

    async def healthz(call: Call) -> None:
        health = deps.system.health()
        await _answer(call, 200 if health == "ok" else 503, JSON, msgspec.json.encode(Health(health)))

    async def tasks(call: Call) -> None:
        call.query(credentials=False).done()
        await _answer(call, 200, "text/plain; charset=utf-8", f"{dump_tasks()}\n".encode())

    return [
        StreamRoute(re.compile(r"/healthz\Z"), healthz),
        StreamRoute(re.compile(r"/api/v1/system/tasks\Z"), tasks),
    ]


async def _answer(call: Call, status: int, content_type: str, body: bytes) -> None:
    headers = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
    await call.reject(status, headers, body)


class _Late:
    """An ASGI app that a thread creates at its first request, or a moment after the start.

    Supervisors ask for `/healthz` first, and a concurrent import would slow that down. It does not wait for a request,
    because an upgrade may replace the program's files.
    """

    def __init__(self, host: Host, make: Callable[[], AsgiApp]) -> None:
        self._host = host
        self._make = make
        self._making = trio.Lock()
        self._app: AsgiApp | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            async with open_helpers() as helpers:
                helpers.start_soon(self._make_soon)
                await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await (self._app or await self._made())(scope, receive, send)

    async def _make_soon(self) -> None:
        backoff = Backoff(_SOON_S, _RETRY_MAX_S)
        while self._app is None:
            await backoff.pause()
            with suppress(Problem):
                await self._made()

    async def _made(self) -> AsgiApp:
        """Returns the app. :raises Problem: 503, the program's files can't be read, for example for lack of file
        descriptors."""
        async with self._making:
            if self._app is None:
                try:
                    self._app = await self._host.threads.run(self._make)
                except OSError as error:
                    raise Problem(
                        503, "daemon-starting", f"the daemon can't load a part of itself: {error.strerror}",
                        hint="try again in a moment", retry_after_s=_RETRY_AFTER_S,
                    ) from error  # fmt: skip
        return self._app
