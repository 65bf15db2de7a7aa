"""`volar fleet`."""

from __future__ import annotations

import click

from volant.client import FleetOperations

from ._derived import derived
from ._lazy_group import Lazy, LazyGroup

_LAZY = {
    "join": Lazy("_fleet_join:join", "Add this host to a fleet: check everything, then write the settings."),
    "leave": Lazy("_fleet_join:leave", "Remove this host from its fleet, and remove the settings."),
    "status": derived("fleet", FleetOperations, "get"),
}


@click.group(name="fleet", cls=LazyGroup, lazy=_LAZY)
def group() -> None:
    """Show the fleet of a host, join a fleet, or leave it."""
