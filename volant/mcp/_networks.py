"""Tools for networks with a name, whose guests reach each other."""

from __future__ import annotations

import msgspec
import trio

from volant.journal import AddNetwork, RemoveNetwork
from volant.model import CreateNetwork, Name, NetworkView, no_such_network
from volant.operations import ask_journal, shown_network, shown_networks

from ._text import fitting
from ._tool import Asked, Result


class ListNetworks(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """All of them."""

    network: Name | None = None
    """Only this one."""


class NetworkList(msgspec.Struct, frozen=True):
    """Networks, by name."""

    networks: list[NetworkView]
    left_out: int
    """How many did not fit; ask for them by name."""


async def list_networks(asked: Asked, wanted: ListNetworks) -> Result:
    projection = asked.deps.store.projection
    await trio.lowlevel.checkpoint()
    if wanted.network is None:
        found = shown_networks(projection)
    elif (network := projection.networks.get(wanted.network)) is not None:
        found = [shown_network(network, projection)]
    else:
        raise no_such_network(wanted.network)
    page = fitting(found)
    return Result(NetworkList(page, len(found) - len(page)))


class MakeNetwork(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What it is called."""

    network: Name


async def create_network(asked: Asked, wanted: MakeNetwork) -> Result:
    made = await ask_journal(asked.deps, AddNetwork(CreateNetwork(name=wanted.network)))
    return Result(shown_network(made, asked.deps.store.projection))


class WhichNetwork(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which network."""

    network: Name


class DeletedNetwork(msgspec.Struct, frozen=True):
    """It is gone."""

    deleted: str


async def delete_network(asked: Asked, wanted: WhichNetwork) -> Result:
    await ask_journal(asked.deps, RemoveNetwork(wanted.network))
    return Result(DeletedNetwork(wanted.network))
