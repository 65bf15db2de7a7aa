"""The app: Quart for single answers, plain coroutines for streams, and one middleware around both."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from volant import agui, mcp, web
from volant.concurrency import Backoff, FairShare, open_helpers
from volant.host import Host
from volant.http import AsgiApp, Limits, Middleware
from volant.model import Problem
from volant.operations import TABLE, Admission, ApiDeps, Table
from volant.relay import Relay

from . import (
    _actions,
    _agent,
    _artifacts,
    _audit,
    _backups,
    _console,
    _devtools,
    _events,
    _images,
    _logs,
    _port_origins,
    _sign_in,
    _system,
    _tcp,
)

_SOON_S = 1.0
"""The first probe of a supervisor is answered by then."""
_RETRY_MAX_S = 30.0
_RETRY_AFTER_S = 1


def create_app(deps: ApiDeps, limits: Limits | None = None, table: Table = TABLE) -> Middleware:
    """Returns the app that serves a table of operations, to be handed to `volant.http.serve`."""
    limits = limits or Limits()
    share = FairShare()
    relay = Relay(share)
    streams = [
        *_system.routes(deps),
        *_agent.routes(deps, relay),
        *_actions.routes(deps, relay),
        *_devtools.routes(deps, relay, share),
        *_events.routes(deps),
        *_audit.routes(deps),
        *_logs.routes(deps, share),
        *_console.routes(deps, share),
        *_tcp.routes(deps, share),
        *_backups.routes(deps, limits),
        *_artifacts.routes(deps),
        *_images.routes(deps),
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


class _Late:
    """An ASGI app that is made in a thread: at its first request, else a moment after the start.

    Whoever starts the daemon asks for `/healthz` first, and an import slows all that runs beside it. It does not wait
    for a request, as an upgrade may replace the program's files.
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
        """:raises Problem: 503 the program's files can't be read, as the process is short of descriptors, say."""
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
