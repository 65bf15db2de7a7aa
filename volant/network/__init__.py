"""Sets up the host's networks: bridge, taps, addresses, firewall and passt."""

from ._actor import NetworkKeeper
from ._backend import (
    BridgeDown,
    ForgetConnections,
    Link,
    MakeBridge,
    MakeTap,
    NetworkBackend,
    NetworkFailed,
    RemoveLink,
    Route,
    SetLocalnet,
    Step,
)
from ._egress import DeniedDestination, EgressFilter, Resolvers
from ._egress_rules import EgressGuest
from ._netlink import HostNetwork, may_configure_networks
from ._networks import Networks
from ._passt import Passt, passt_obstacle, passt_socket
from ._passt_filter import passt_user, restricted_passt_users
from ._plan import NetworkSettings

__all__ = [
    "BridgeDown",
    "DeniedDestination",
    "EgressFilter",
    "EgressGuest",
    "ForgetConnections",
    "HostNetwork",
    "Link",
    "MakeBridge",
    "MakeTap",
    "NetworkBackend",
    "NetworkFailed",
    "NetworkKeeper",
    "NetworkSettings",
    "Networks",
    "Passt",
    "RemoveLink",
    "Resolvers",
    "Route",
    "SetLocalnet",
    "Step",
    "may_configure_networks",
    "passt_obstacle",
    "passt_socket",
    "passt_user",
    "restricted_passt_users",
]
