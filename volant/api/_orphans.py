"""`/api/v1/system/orphans`: hypervisors that run and that no VM owns."""

from __future__ import annotations

from urllib.parse import quote

from quart import Response
from quart_trio import QuartTrio

from volant.http import Nothing, empty_response, json_response, read_body
from volant.model import check_name, view
from volant.operations import ApiDeps

from ._params import etag, no_query, query


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/system/orphans")
    async def list_orphans() -> Response:
        no_query()
        return json_response([orphan.view() for orphan in await deps.vms.orphans()])

    @app.post("/api/v1/system/orphans/<mark>/adopt")
    async def adopt_orphan(mark: str) -> Response:
        parameters = query()
        name = parameters.text("name")
        parameters.done()
        await read_body(Nothing)
        row = await deps.vms.adopt_orphan(mark, None if name is None else check_name(name, "name"))
        response = json_response(view(row), 201)
        response.headers["ETag"] = etag(row.id, row.revision)
        response.headers["Location"] = f"/api/v1/vms/{quote(row.name)}"
        return response

    @app.post("/api/v1/system/orphans/<mark>/kill")
    async def kill_orphan(mark: str) -> Response:
        no_query()
        await read_body(Nothing)
        await deps.vms.kill_orphan(mark)
        return empty_response(204)
