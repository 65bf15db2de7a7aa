"""`/healthz` and `/api/v1/system/*`: the daemon about itself."""

from __future__ import annotations

from collections import Counter

from quart import Response
from quart_trio import QuartTrio

from volant import __version__
from volant.model import Health, Status, SystemStatus

from ._doors import Doors
from ._json import json_response
from ._params import no_query


def add_routes(app: QuartTrio, doors: Doors) -> None:
    """The routes of this resource."""

    @app.get("/healthz")
    async def healthz() -> Response:
        health = doors.system.health()
        return json_response(Health(health), 200 if health == "ok" else 503)

    @app.get("/api/v1/system/status")
    async def status() -> Response:
        no_query()
        rows = doors.store.projection.rows()
        states = Counter(row.status for row in rows)
        figures = doors.host.figures()
        used = figures.memory_total_mb - figures.memory_available_mb
        return json_response(
            SystemStatus(
                status=doors.system.health(),
                vm_count=len(rows),
                vms={state.value: states[state] for state in Status},
                cpu_percent=figures.cpu_percent,
                mem_percent=round(100.0 * used / max(1, figures.memory_total_mb), 1),
                version=__version__,
                uptime_s=round((doors.host.wall_clock() - doors.system.started_at).total_seconds(), 3),
            )
        )

    @app.get("/api/v1/system/info")
    async def info() -> Response:
        no_query()
        return json_response(doors.system.info())

    @app.get("/api/v1/system/tree")
    async def tree() -> Response:
        no_query()
        return json_response(doors.system.tree())
