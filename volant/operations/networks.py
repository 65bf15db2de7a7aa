"""Named networks, in which VMs reach each other."""

from __future__ import annotations

from volant.journal import AddNetwork, NetworkCreated, Projection, RemoveNetwork, ask_journal
from volant.model import CreateNetwork, Network, NetworkView, Permission, network_view, no_such_network

from ._context import Context
from ._table import TABLE, Tool


@TABLE.operation(
    "GET /api/v1/networks",
    permission=Permission.VIEW,
    answer="The networks, by name",
    tool=Tool(
        title="List networks",
        description="List the networks in which VMs reach each other by name, with their VMs and addresses.",
        only={"network": "name"},
    ),
)
async def list_networks(context: Context) -> list[NetworkView]:
    """List networks in which VMs reach each other."""
    projection, project = context.deps.store.projection, context.listed
    networks = sorted(projection.networks.items())
    return [_shown(network, projection) for key, network in networks if project in (None, key.project)]


@TABLE.operation(
    "POST /api/v1/networks",
    permission=Permission.CONTROL,
    status=201,
    answer="The network",
    errors=(404, 503),
    idempotent=True,
    tool=Tool(
        "networks_create",
        "Make a network",
        "Make a network in which VMs reach each other by their names; pass its name as `network` to vms_create. Other "
        "VMs can't reach them.",
    ),
    journaled=True,
    examples={"A network": {"name": "back"}},
)
async def create_network(context: Context, *, body: CreateNetwork) -> NetworkCreated:
    """Create a network.

    VMs created with its name as `network` reach each other in it by their names.
    """
    return NetworkCreated.of(await ask_journal(context.deps.journal, AddNetwork(body, context.project, context.key)))


@TABLE.operation("GET /api/v1/networks/{name}", permission=Permission.VIEW, answer="The network")
async def get_network(context: Context, name: str) -> NetworkView:
    """Get a network, with the VMs in it."""
    projection = context.deps.store.projection
    found = projection.networks.get(context.named(name))
    if found is None:
        raise no_such_network(name)
    return _shown(found, projection)


@TABLE.operation(
    "DELETE /api/v1/networks/{name}",
    permission=Permission.CONTROL,
    answer="Deleted",
    errors=(409, 503),
    tool=Tool(
        "networks_delete",
        "Delete a network",
        "Delete a network without VMs; delete its VMs first, with vms_delete.",
        destructive=True,
        idempotent=True,
    ),
    journaled=True,
)
async def delete_network(context: Context, name: str) -> None:
    """Delete a network that no VM is in."""
    await ask_journal(context.deps.journal, RemoveNetwork(context.named(name)))


def _shown(network: Network, projection: Projection) -> NetworkView:
    return network_view(network, projection.members(network.key))
