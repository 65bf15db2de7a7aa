"""Sets up the host's networks: bridge, taps, addresses, firewall and passt."""

from ._actor import NetworkKeeper as NetworkKeeper
from ._backend import (
    BridgeDown as BridgeDown,
    ForgetConnections as ForgetConnections,
    Link as Link,
    MakeBridge as MakeBridge,
    MakeTap as MakeTap,
    NetworkBackend as NetworkBackend,
    NetworkFailed as NetworkFailed,
    RemoveLink as RemoveLink,
    Route as Route,
    SetLocalnet as SetLocalnet,
    Step as Step,
)
from ._egress import DeniedDestination as DeniedDestination, EgressFilter as EgressFilter, Resolvers as Resolvers
from ._egress_rules import EgressGuest as EgressGuest
from ._netlink import HostNetwork as HostNetwork, may_configure_networks as may_configure_networks
from ._networks import Networks as Networks
from ._passt import Passt as Passt, passt_obstacle as passt_obstacle, passt_socket as passt_socket
from ._passt_filter import passt_user as passt_user, restricted_passt_users as restricted_passt_users
from ._plan import NetworkSettings as NetworkSettings
