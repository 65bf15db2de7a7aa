"""`/openapi.json`: the documentation of the API, for machines. The page `/docs` shows it to people (`volant.web`)."""

from __future__ import annotations

import msgspec
from quart import Response
from quart_trio import QuartTrio

from volant.operations import ApiDeps, Table

from ._json import no_query
from ._openapi import document


def add_routes(app: QuartTrio, deps: ApiDeps, table: Table) -> None:
    """The routes of this resource."""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        no_query()
        # Built at the first request, in a thread, as it reads source files.
        plain = await deps.host.threads.run(document, table)
        return Response(msgspec.json.encode(plain), content_type="application/json")
