"""Hosts of a fleet: look at them, and drain them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from volant.model import FleetView, HostMoves, HostView, Permission, Problem

from ._context import Context
from ._parameters import Flag
from ._table import TABLE

if TYPE_CHECKING:
    from volant.fleet import Fleet

_HOST = "/api/v1/hosts/{name}"
_ASK_S = 5.0


@TABLE.operation("GET /api/v1/fleet", permission=Permission.VIEW, answer="The fleet", errors=(409,))
async def get_fleet(context: Context) -> FleetView:
    """Show the fleet, as the host that answers sees it."""
    return _fleet(context).view()


@TABLE.operation(
    "POST /api/v1/fleet/leave",
    permission=Permission.ADMIN,
    answer="The fleet does not know the host any more",
    errors=(409, 503),
)
async def leave_fleet(
    context: Context,
    *,
    keep_vms: Annotated[bool, Flag(help="Keep its VMs, snapshots and volumes, as this host's alone")] = False,
) -> None:
    """Take the host that answers out of its fleet. The fleet forgets it and what it has, whose names are free then.

    Its VMs run on. It refuses what the fleet had to agree on, such as new VMs, until `volantd` is restarted without the
    settings of the fleet. `volar fleet leave` removes these, too.
    """
    await _member(context).leave(keep_vms=keep_vms)


@TABLE.operation("GET /api/v1/hosts", permission=Permission.VIEW, answer="By name", errors=(409,))
async def list_hosts(context: Context) -> list[HostView]:
    """List the hosts of the fleet."""
    return _fleet(context).hosts()


@TABLE.operation(f"GET {_HOST}", permission=Permission.VIEW, answer="The host", errors=(409,))
async def get_host(context: Context, name: str) -> HostView:
    """Get a host of the fleet."""
    return _fleet(context).get(name)


@TABLE.operation(f"POST {_HOST}/drain", permission=Permission.ADMIN, answer="The host", errors=(409, 503))
async def drain_host(
    context: Context,
    name: str,
    *,
    keep_vms: Annotated[bool, Flag(help="Let the VMs that it has run on")] = False,
) -> HostView:
    """Let a host get no new VMs, and move those that it has to other hosts, until `undrain`.

    Each VM is paused while it is copied, two at a time, and goes on where it was, with memory and disk. VMs that can't
    move stay, and `moves` says why. The drain goes on without the client, and when a daemon is restarted.
    """
    return await _fleet(context).drain(name, keep_vms=keep_vms)


@TABLE.operation(f"POST {_HOST}/undrain", permission=Permission.ADMIN, answer="The host", errors=(409, 503))
async def undrain_host(context: Context, name: str) -> HostView:
    """Let a host get new VMs again, and keep those that it has. A VM that is being copied goes on where it was."""
    return await _fleet(context).undrain(name)


@TABLE.operation(
    f"GET {_HOST}/moves",
    permission=Permission.ADMIN,
    answer="Its VMs while it is drained",
    errors=(409, 503),
    client="hosts.moves",
)
async def host_moves(context: Context, name: str) -> HostMoves:
    """Show what becomes of the VMs of a host that is being drained: which wait, move, or stay, and why."""
    fleet = _fleet(context)
    if name == fleet.host:
        return fleet.moves()
    fleet.get(name)
    from volant.fleet import request_headers

    headers = request_headers(context.scope)
    answer = await fleet.peers.ask(name, f"/api/v1/hosts/{name}/moves", headers, timeout_s=_ASK_S)
    if answer.status != 200:
        raise Problem(
            503, "host-unreachable", f"the host {name!r} answers with {answer.status}", hint="try again",
            retry_after_s=2,
        )  # fmt: skip
    return msgspec.json.decode(answer.body, type=HostMoves)


@TABLE.operation(
    f"DELETE {_HOST}", permission=Permission.ADMIN, answer="The fleet does not know it any more", errors=(409, 503)
)
async def delete_host(context: Context, name: str) -> None:
    """Forget a host that is gone for good. The names of its VMs are free then.

    A host that gives a sign of life can't be deleted. If one that was deleted comes back, it is a new host, with its
    VMs.
    """
    await _fleet(context).delete(name)


def _fleet(context: Context) -> Fleet:
    """:raises Problem: 409 the host is in no fleet."""
    fleet = _member(context)
    if fleet.left:
        raise Problem(409, "no-fleet", "this host has left its fleet", hint="restart volantd to use it without one")
    return fleet


def _member(context: Context) -> Fleet:
    """Returns also a fleet that the host has left. :raises Problem: 409 the host is in no fleet."""
    fleet = context.deps.fleet
    if fleet is None:
        raise Problem(409, "no-fleet", "this host is in no fleet", hint="`volar fleet join` makes it one of a fleet")
    return fleet
