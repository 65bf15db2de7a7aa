"""`/api/v1/templates`: what VMs begin as clones of."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from volant.http import Nothing, empty_response, json_response, read_body
from volant.model import BuildTemplate
from volant.operations import ApiDeps

from ._params import no_query


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/templates")
    async def list_templates() -> Response:
        no_query()
        return json_response(await deps.vms.templates())

    @app.post("/api/v1/templates")
    async def build_template() -> Response:
        no_query()
        return json_response(await deps.vms.build_template(await read_body(BuildTemplate)), 201)

    @app.delete("/api/v1/templates/<digest>")
    async def remove_template(digest: str) -> Response:
        no_query()
        await read_body(Nothing)
        await deps.vms.remove_template(digest)
        return empty_response(204)
