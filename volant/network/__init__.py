"""The host's side of networks: bridge, taps, addresses, firewall."""

from ._door import Link, MakeBridge, MakeTap, NetworkDoor, NetworkFailed, RemoveLink, Route, SetLocalnet, Step
from ._plan import NetworkPlan, NetworkSettings, plan_of

__all__ = [
    "Link",
    "MakeBridge",
    "MakeTap",
    "NetworkDoor",
    "NetworkFailed",
    "NetworkPlan",
    "NetworkSettings",
    "RemoveLink",
    "Route",
    "SetLocalnet",
    "Step",
    "plan_of",
]
