"""`volar networks`."""

from __future__ import annotations

import click

from volant.client import NetworksOperations
from volant.model import NetworkView

from ._derived import Shown, add_commands
from ._lazy_group import LazyGroup
from ._shown import Sheet


@click.group(name="networks", cls=LazyGroup)
def group() -> None:
    """Manage networks in which VMs reach each other by name.

    `volar vms create --network NAME` puts a VM into one for good. VMs in different networks, and VMs with the network
    `bridge`, can't reach each other.
    """


_SHEET = Sheet(("name", "members", "created_at"), cells={"members": lambda network: len(network.vms)})
add_commands(group, "networks", NetworksOperations, Shown({NetworkView: _SHEET}))
