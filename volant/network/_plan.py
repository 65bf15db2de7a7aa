"""What of networks should be on the host, from the rows alone.

A VM has a tap while it has a process: from the commit of the tag that the process will carry, until its process is
being ended. So whoever derives the plan after a crash, of the actor, the daemon or the host, derives the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Interface, IPv4Network

import msgspec

from volant.model import Phase, PublishedPort, VmRow, gateway_of, is_named, tap_prefix

from ._backend import Link, MakeBridge, MakeTap, NetworkFailed, RemoveLink, Route, SetLocalnet, Step

_NAME_BYTES = 15
"""Of a network interface."""
_EVERYTHING_BITS = 8
"""A route this wide or wider is a way out into the world, whatever it is called, and nobody's subnet."""


class NetworkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator has said, and what tells this daemon from every other one."""

    instance: str
    """Ten hexadecimal digits that tell this state directory from every other one."""
    subnet: IPv4Network
    bridge: str = ""
    """The name of the bridge; empty: one that carries the instance."""

    @property
    def bridge_name(self) -> str:
        # Shorter than a tap's name, hence never one.
        return self.bridge or f"{tap_prefix(self.instance)}br"

    @property
    def bridge_mac(self) -> str:
        """The whole instance is in it: by this a bridge is known to be ours, whatever its name."""
        return (b"\x06" + bytes.fromhex(self.instance)).hex(":")

    @property
    def table(self) -> str:
        """The name of both firewall tables."""
        return f"volant-{self.instance}"

    @property
    def tables(self) -> tuple[str, str]:
        """Both, with their families: of frames, and of packets."""
        return f"bridge {self.table}", f"inet {self.table}"

    @property
    def passt_table(self) -> str:
        """The table, with its family, for what passt sends."""
        return f"inet {self.table}-user"


class Tap(msgspec.Struct, frozen=True, kw_only=True):
    """A VM on the bridge."""

    vm_id: int
    name: str
    mac: str
    address: str
    network: str
    """Whose other members it reaches; empty: nobody's."""
    ports: tuple[PublishedPort, ...]


class NetworkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that should be there, once there is anything at all."""

    settings: NetworkSettings
    gateways: tuple[IPv4Interface, ...]
    """The bridge's addresses: that of the subnet, and those of VMs that were created when it was another one."""
    taps: tuple[Tap, ...]
    """By the ids of their VMs."""

    @property
    def localnet(self) -> bool:
        """Whether a port is published where the host itself reaches it by a loopback address."""
        return any(port.host.startswith(("127.", "0.0.0.0")) for tap in self.taps for port in tap.ports)


def has_tap(row: VmRow) -> bool:
    """Whether a VM has, or is about to have, a process with a NIC on the bridge."""
    return row.lease is not None and bool(row.lease.tap and row.tag) and row.phase not in (Phase.KILL, Phase.REMOVE)


def plan_of(settings: NetworkSettings, rows: Iterable[VmRow]) -> NetworkPlan:
    """What should be there."""
    gateways = {f"{gateway_of(settings.subnet)}/{settings.subnet.prefixlen}"}
    taps = []
    for row in sorted(filter(has_tap, rows), key=lambda row: row.id):
        lease = row.lease
        assert lease is not None
        gateways.add(f"{lease.gateway}/{lease.prefix}")
        taps.append(
            Tap(
                vm_id=row.id,
                name=lease.tap,
                mac=lease.mac,
                address=lease.address,
                network=row.network if is_named(row.network) else "",
                ports=row.ports,
            )
        )
    return NetworkPlan(settings=settings, gateways=tuple(sorted(map(IPv4Interface, gateways))), taps=tuple(taps))


def may_be_ours(settings: NetworkSettings, name: str) -> bool:
    """Whether a link of this name is one of ours, should it be of the right kind."""
    return name == settings.bridge_name or name.startswith(tap_prefix(settings.instance))


def is_ours(settings: NetworkSettings, link: Link) -> bool:
    """Whether we have made a link, under these settings or others."""
    return is_tap(settings, link) or (link.kind == "bridge" and link.mac == settings.bridge_mac)


def is_tap(settings: NetworkSettings, link: Link) -> bool:
    """Whether a link is a tap of ours."""
    return link.kind == "tun" and len(link.name) == _NAME_BYTES and link.name.startswith(tap_prefix(settings.instance))


def steps_to(plan: NetworkPlan, links: Collection[Link]) -> list[Step]:
    """What is to be done where `links` are all that there are. A tap that nobody should have and a process has open is
    left, as that process may be a VM's that is found again.

    :raises NetworkFailed: the bridge's name is somebody else's.
    """
    settings = plan.settings
    check_bridge(settings, links)
    wanted = {settings.bridge_name, *(tap.name for tap in plan.taps)}
    ready = {link.name for link in links if is_tap(settings, link) and link.master == settings.bridge_name and link.up}
    stale = [link for link in links if is_ours(settings, link) and link.name not in wanted and not link.in_use]
    return [
        make_bridge(plan),
        *(make_tap(plan, tap) for tap in plan.taps if tap.name not in ready),
        *(RemoveLink(name=link.name, kind=link.kind) for link in stale),
        SetLocalnet(bridge=settings.bridge_name, on=plan.localnet),
    ]


def make_bridge(plan: NetworkPlan) -> MakeBridge:
    """The step that makes the bridge as it should be."""
    return MakeBridge(
        name=plan.settings.bridge_name,
        mac=plan.settings.bridge_mac,
        addresses=tuple(str(gateway) for gateway in plan.gateways),
    )


def make_tap(plan: NetworkPlan, tap: Tap) -> MakeTap:
    """The step that makes a VM's tap as it should be."""
    return MakeTap(name=tap.name, bridge=plan.settings.bridge_name)


def check_bridge(settings: NetworkSettings, links: Iterable[Link]) -> None:
    """:raises NetworkFailed: there is a link of the bridge's name, and it is not ours."""
    for link in links:
        if link.name == settings.bridge_name and not is_ours(settings, link):
            raise NetworkFailed(
                "bridge_taken",
                f"there is a network interface {link.name} that this daemon has not made; give the bridge another "
                "name (VOLANT_BRIDGE), or remove that one",
            )


def check_subnets(plan: NetworkPlan, routes: Sequence[Route], links: Iterable[Link]) -> None:
    """A subnet that the bridge has already is not looked at again: its VMs would be none the better for it.

    :param links: those of the host, at least our bridge
    :raises NetworkFailed: the host has another way to addresses that are to be ours.
    """
    bridges = {link.name for link in links if is_ours(plan.settings, link)}
    ours = {IPv4Network(route.destination) for route in routes if route.device in bridges}
    subnets = [gateway.network for gateway in plan.gateways if gateway.network not in ours]
    for route in routes:
        destination = IPv4Network(route.destination)
        if route.device in bridges or destination.prefixlen < _EVERYTHING_BITS:
            continue
        for subnet in subnets:
            if subnet.overlaps(destination):
                raise NetworkFailed(
                    "subnet_in_use",
                    f"the subnet {subnet} is in use on this host: it has the route {route}; give the daemon another "
                    "subnet (VOLANT_SUBNET), or remove that route",
                )
