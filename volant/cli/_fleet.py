"""`volar fleet`."""

from __future__ import annotations

import click

from ._lazy_group import Lazy, LazyGroup
from ._run import Session, command

_LAZY = {
    "join": Lazy("_fleet_join:join", "Add this host to a fleet: check everything, then write the settings."),
    "leave": Lazy("_fleet_join:leave", "Remove this host from its fleet, and remove the settings."),
}


@click.group(name="fleet", cls=LazyGroup, lazy=_LAZY)
def group() -> None:
    """Show the fleet of a host, join a fleet, or leave it."""


@command(group, "status")
async def status(session: Session) -> None:
    """Show the fleet, as seen by the host that answers."""
    fleet = await session.client.fleet.get()
    if session.out.json:
        session.out.document(fleet)
        return
    fields = [
        ("host", fleet.host),
        ("hosts", f"{fleet.hosts}, {len(fleet.unreachable)} of them unreachable"),
        ("unreachable", ", ".join(fleet.unreachable) or "-"),
        ("VMs", str(fleet.vms)),
        ("etcd", fleet.etcd if fleet.age_s is None else f"{fleet.etcd}, read {fleet.age_s:g} s ago"),
        ("fence", fleet.fence if fleet.fence_obstacle is None else f"{fleet.fence}: {fleet.fence_obstacle}"),
        ("trouble", fleet.trouble or "-"),
        ("conflicts", ", ".join(fleet.conflicts) or "-"),
    ]
    session.out.fields(fields)
