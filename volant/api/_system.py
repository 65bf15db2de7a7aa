"""`/healthz` and `/api/v1/system/tasks`, which need their own route: one sets its status, the other is plain text."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from volant.concurrency import dump_tasks
from volant.http import json_response, no_query
from volant.model import Health
from volant.operations import ApiDeps


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """Adds these routes."""

    @app.get("/healthz")
    async def healthz() -> Response:
        health = deps.system.health()
        return json_response(Health(health), 200 if health == "ok" else 503)

    @app.get("/api/v1/system/tasks")
    async def tasks() -> Response:
        no_query()
        return Response(f"{dump_tasks()}\n", content_type="text/plain; charset=utf-8")
