"""`/healthz` and `/api/v1/system/*`: the daemon about itself."""

from __future__ import annotations

from collections import Counter

from quart import Response
from quart_trio import QuartTrio

from volant import __version__
from volant.concurrency import dump_tasks
from volant.http import Nothing, json_response, read_body
from volant.model import Health, Status, SystemStatus
from volant.model.agent import DEFAULT_GRACE_S, MAX_GRACE_S
from volant.operations import ApiDeps

from ._params import no_query, query


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """The routes of this resource."""

    @app.get("/healthz")
    async def healthz() -> Response:
        health = deps.system.health()
        return json_response(Health(health), 200 if health == "ok" else 503)

    def now() -> SystemStatus:
        rows = deps.store.projection.rows()
        states = Counter(row.status for row in rows)
        figures = deps.host.machine.figures()
        used = figures.memory_total_mb - figures.memory_available_mb
        drain = deps.store.projection.drain
        return SystemStatus(
            status=deps.system.health(),
            vm_count=len(rows),
            vms={state.value: states[state] for state in Status},
            cpu_percent=figures.cpu_percent,
            mem_percent=round(100.0 * used / max(1, figures.memory_total_mb), 1),
            version=__version__,
            uptime_s=round((deps.host.clock.now() - deps.system.started_at).total_seconds(), 3),
            draining_since=None if drain is None else drain.since,
        )

    @app.get("/api/v1/system/status")
    async def status() -> Response:
        no_query()
        return json_response(now())

    @app.post("/api/v1/system/drain")
    async def drain() -> Response:
        parameters = query()
        stop_vms = parameters.flag("stop_vms", False)
        grace_s = parameters.duration("grace", DEFAULT_GRACE_S, maximum_s=MAX_GRACE_S)
        parameters.done()
        await read_body(Nothing)
        await deps.vms.drain(grace_s if stop_vms else None)
        return json_response(now())

    @app.post("/api/v1/system/undrain")
    async def undrain() -> Response:
        no_query()
        await read_body(Nothing)
        await deps.vms.undrain()
        return json_response(now())

    @app.get("/api/v1/system/info")
    async def info() -> Response:
        no_query()
        return json_response(deps.system.info())

    @app.get("/api/v1/system/tasks")
    async def tasks() -> Response:
        no_query()
        return Response(f"{dump_tasks()}\n", content_type="text/plain; charset=utf-8")

    @app.get("/api/v1/system/tree")
    async def tree() -> Response:
        no_query()
        return json_response(deps.system.tree())
