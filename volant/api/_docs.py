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

    encoded = b""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        nonlocal encoded
        no_query()
        # Built at the first request, in a thread, as it reads source files.
        encoded = encoded or await deps.host.threads.run(lambda: msgspec.json.encode(document(table)))
        return Response(encoded, content_type="application/json")
