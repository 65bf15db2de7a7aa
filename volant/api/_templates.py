"""`/api/v1/templates`: what VMs begin as clones of."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from volant.model import BuildTemplate

from ._body import Nothing, read_body
from ._doors import Doors
from ._json import empty_response, json_response
from ._params import no_query


def add_routes(app: QuartTrio, doors: Doors) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/templates")
    async def list_templates() -> Response:
        no_query()
        return json_response(await doors.vms.templates())

    @app.post("/api/v1/templates")
    async def build_template() -> Response:
        no_query()
        return json_response(await doors.vms.build_template(await read_body(BuildTemplate)), 201)

    @app.delete("/api/v1/templates/<digest>")
    async def remove_template(digest: str) -> Response:
        no_query()
        await read_body(Nothing)
        await doors.vms.remove_template(digest)
        return empty_response(204)
