"""Networks as clients see them."""

from __future__ import annotations

from volant.journal import Projection
from volant.model import Network, NetworkView, network_view


def shown_networks(projection: Projection) -> list[NetworkView]:
    """All, by name."""
    return [shown_network(network, projection) for _, network in sorted(projection.networks.items())]


def shown_network(network: Network, projection: Projection) -> NetworkView:
    """One, with the VMs that are in it."""
    return network_view(network, projection.members(network.name))
