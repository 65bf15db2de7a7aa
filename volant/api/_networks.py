"""`/api/v1/networks`: those with a name, whose guests reach each other."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from volant.http import Nothing, empty_response, json_response, read_body
from volant.journal import AddNetwork, IdempotencyKey, NetworkCreated, RemoveNetwork
from volant.model import CreateNetwork, no_such_network
from volant.operations import ApiDeps, ask_journal, shown_network, shown_networks

from ._idempotency import Repeats
from ._params import no_query
from ._results import respond


def add_routes(app: QuartTrio, deps: ApiDeps, repeats: Repeats) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/networks")
    async def list_networks() -> Response:
        no_query()
        return json_response(shown_networks(deps.store.projection))

    @app.post("/api/v1/networks")
    async def create_network() -> Response:
        no_query()
        wanted = await read_body(CreateNetwork)

        async def create(key: IdempotencyKey | None) -> NetworkCreated:
            return NetworkCreated.of(await ask_journal(deps, AddNetwork(wanted, key)))

        return respond(await repeats.run(wanted, create))

    @app.get("/api/v1/networks/<name>")
    async def get_network(name: str) -> Response:
        no_query()
        found = deps.store.projection.networks.get(name)
        if found is None:
            raise no_such_network(name)
        return json_response(shown_network(found, deps.store.projection))

    @app.delete("/api/v1/networks/<name>")
    async def remove_network(name: str) -> Response:
        no_query()
        await read_body(Nothing)
        await ask_journal(deps, RemoveNetwork(name))
        return empty_response(204)
