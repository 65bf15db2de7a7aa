"""`/api/v1/system/orphans`: hypervisors that run and that no VM owns."""

from __future__ import annotations

from urllib.parse import quote

from quart import Response
from quart_trio import QuartTrio

from volant.model import check_name, view

from ._body import Nothing, read_body
from ._doors import Doors
from ._json import empty_response, json_response
from ._params import etag, no_query, query


def add_routes(app: QuartTrio, doors: Doors) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/system/orphans")
    async def list_orphans() -> Response:
        no_query()
        return json_response([orphan.view() for orphan in await doors.vms.orphans()])

    @app.post("/api/v1/system/orphans/<mark>/adopt")
    async def adopt_orphan(mark: str) -> Response:
        parameters = query()
        name = parameters.text("name")
        parameters.done()
        await read_body(Nothing)
        row = await doors.vms.adopt_orphan(mark, None if name is None else check_name(name, "name"))
        response = json_response(view(row), 201)
        response.headers["ETag"] = etag(row)
        response.headers["Location"] = f"/api/v1/vms/{quote(row.name)}"
        return response

    @app.post("/api/v1/system/orphans/<mark>/kill")
    async def kill_orphan(mark: str) -> Response:
        no_query()
        await read_body(Nothing)
        await doors.vms.kill_orphan(mark)
        return empty_response(204)
