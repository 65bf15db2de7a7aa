"""`volar networks`."""

from __future__ import annotations

import click

from volant.client import NetworksOperations
from volant.model import NetworkView

from ._complete import network_names
from ._derived import add_commands
from ._lazy_group import LazyGroup
from ._options import listing
from ._output import Output
from ._run import Session, command
from ._text import safe


@click.group(name="networks", cls=LazyGroup)
def group() -> None:
    """Manage networks in which VMs reach each other by name.

    `volar vms create --network NAME` puts a VM into one for good. VMs in different networks, and VMs with the network
    `bridge`, can't reach each other.
    """


network_argument = click.argument("network", shell_complete=network_names)


@command(group, "list")
@listing
async def list_(session: Session) -> None:
    """List networks."""
    networks = await session.client.networks.list()
    rows = ((each.name, len(each.vms), f"{each.created_at:%Y-%m-%d %H:%M:%S}") for each in networks)
    session.out.listing(networks, ("NAME", "VMS", "CREATED (UTC)"), rows)


@command(group, "create")
@click.argument("network")
async def create(session: Session, network: str) -> None:
    """Create a network."""
    made = await session.client.networks.create(network)
    session.out.result(made, f"network {safe(made.name)} is created")


@command(group, "get")
@network_argument
async def get(session: Session, network: str) -> None:
    """Show a network, and the VMs in it with their addresses."""
    _show(session.out, await session.client.networks.get(network))


def _show(out: Output, network: NetworkView) -> None:
    if out.json:
        out.document(network)
        return
    out.fields([("name", network.name), ("created", f"{network.created_at:%Y-%m-%d %H:%M:%S} UTC")])
    if network.vms:
        out.line("")
        out.table(("VM", "ADDRESS"), list(network.vms.items()))


add_commands(group, "networks", NetworksOperations)
