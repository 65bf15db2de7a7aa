"""Hosts of a fleet: inspect and drain them."""

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
    """Show the fleet, as seen by the host that answers."""
    return _fleet(context).view()


@TABLE.operation(
    "POST /api/v1/fleet/leave",
    permission=Permission.ADMIN,
    answer="The host is removed from the fleet",
    errors=(409, 503),
)
async def leave_fleet(
    context: Context,
    *,
    keep_vms: Annotated[bool, Flag(help="Keep its VMs, snapshots and volumes on this host")] = False,
) -> None:
    """Remove the host that answers from its fleet. The fleet forgets the host and its objects, whose names become free.

    Its VMs keep running. Until `volantd` is restarted without the settings of the fleet, the host refuses requests that
    need the fleet's agreement, such as new VMs. `volar fleet leave` also removes these settings.
    """
    await _member(context).leave(keep_vms=keep_vms)


@TABLE.operation("GET /api/v1/hosts", permission=Permission.VIEW, answer="The hosts, by name", errors=(409,))
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
    keep_vms: Annotated[bool, Flag(help="Keep its VMs running on it")] = False,
) -> HostView:
    """Give a host no new VMs, and move its VMs to other hosts, until `undrain`.

    Each VM is paused while it is copied, two at a time, and continues with memory and disk. VMs that can't move stay,
    and `moves` says why. The drain continues if the client disconnects or a daemon restarts.
    """
    return await _fleet(context).drain(name, keep_vms=keep_vms)


@TABLE.operation(f"POST {_HOST}/undrain", permission=Permission.ADMIN, answer="The host", errors=(409, 503))
async def undrain_host(context: Context, name: str) -> HostView:
    """Give a host new VMs again, and stop moving its VMs away. A VM that is being copied continues on its old host."""
    return await _fleet(context).undrain(name)


@TABLE.operation(
    f"GET {_HOST}/moves",
    permission=Permission.ADMIN,
    answer="The moves of its VMs",
    errors=(409, 503),
    client="hosts.moves",
)
async def host_moves(context: Context, name: str) -> HostMoves:
    """Show the moves of the VMs of a draining host: which wait, move or stay, and why."""
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
    f"DELETE {_HOST}", permission=Permission.ADMIN, answer="The host is removed from the fleet", errors=(409, 503)
)
async def delete_host(context: Context, name: str) -> None:
    """Remove a permanently lost host from the fleet. The names of its VMs become free.

    A reachable host can't be deleted. If a deleted host returns, it is a new host, with its VMs.
    """
    await _fleet(context).delete(name)


def _fleet(context: Context) -> Fleet:
    """Returns the fleet. :raises Problem: 409, the host is in no fleet."""
    fleet = _member(context)
    if fleet.left:
        raise Problem(409, "no-fleet", "this host has left its fleet", hint="restart volantd to use it without one")
    return fleet


def _member(context: Context) -> Fleet:
    """Returns the fleet, even if the host has left it. :raises Problem: 409, the host is in no fleet."""
    fleet = context.deps.fleet
    if fleet is None:
        raise Problem(409, "no-fleet", "this host is in no fleet", hint="`volar fleet join` makes it one of a fleet")
    return fleet
