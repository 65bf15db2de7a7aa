"""`/api/v1/networks`: those with a name, whose guests reach each other."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from quart import Response
from quart_trio import QuartTrio

from volant.journal import AddNetwork, Answer, Once, Projection, RemoveNetwork
from volant.model import CreateNetwork, Network, NetworkView, no_such_network

from ._ask import ask_journal
from ._body import Nothing, read_body
from ._doors import Doors
from ._idempotency import Repeats, answer_of
from ._json import empty_response, json_response
from ._params import no_query


def add_routes(app: QuartTrio, doors: Doors, repeats: Repeats) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/networks")
    async def list_networks() -> Response:
        no_query()
        return json_response(shown_networks(doors.store.projection))

    @app.post("/api/v1/networks")
    async def create_network() -> Response:
        no_query()
        wanted = await read_body(CreateNetwork)

        async def create(once: Once | None) -> Network:
            return await ask_journal(doors, AddNetwork(wanted, once))

        return (await repeats.answer(wanted, create, _made)).response()

    @app.get("/api/v1/networks/<name>")
    async def get_network(name: str) -> Response:
        no_query()
        found = doors.store.projection.networks.get(name)
        if found is None:
            raise no_such_network(name)
        return json_response(shown_network(found, doors.store.projection))

    @app.delete("/api/v1/networks/<name>")
    async def remove_network(name: str) -> Response:
        no_query()
        await read_body(Nothing)
        await ask_journal(doors, RemoveNetwork(name))
        return empty_response(204)


def shown_networks(projection: Projection) -> list[NetworkView]:
    """All, by name."""
    return [shown_network(network, projection) for _, network in sorted(projection.networks.items())]


def shown_network(network: Network, projection: Projection) -> NetworkView:
    """One, with the VMs that are in it."""
    return _view(network, projection.members(network.name))


def _view(network: Network, vms: Mapping[str, str]) -> NetworkView:
    return NetworkView(name=network.name, vms=vms, created_at=network.created_at)


def _made(network: Network) -> Answer:
    return answer_of(_view(network, {}), 201, Location=f"/api/v1/networks/{quote(network.name)}")
