"""Derives the host's networks from the rows.

A VM has a tap from the commit of its process tag until the step that ends the process. So the plan is the same after a
crash of the actor, the daemon or the host.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Interface, IPv4Network

import msgspec

from volant.model import Phase, PublishedPort, VmRow, gateway_of, is_named, is_restricted, tap_prefix

from ._backend import Link, MakeBridge, MakeTap, NetworkFailed, RemoveLink, Route, SetLocalnet, Step

_NAME_BYTES = 15
"""Length of a tap's name, the maximum for an interface (IFNAMSIZ)."""
_DEFAULT_ROUTE_BITS = 8
"""A route with a shorter prefix is a part of a split default route, as created by VPNs, and not a subnet."""


class NetworkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one daemon's networks."""

    instance: str
    """Ten hexadecimal digits, a digest of the state directory. Names contain it, so two daemons never conflict."""
    subnet: IPv4Network
    bridge: str = ""
    """The name of the bridge; empty for one that contains the instance."""

    @property
    def bridge_name(self) -> str:
        # Shorter than a tap's name, so it never is one.
        return self.bridge or f"{tap_prefix(self.instance)}br"

    @property
    def bridge_mac(self) -> str:
        """The MAC that identifies the daemon's bridge when its name has changed. It contains the whole instance."""
        return (b"\x06" + bytes.fromhex(self.instance)).hex(":")

    @property
    def table(self) -> str:
        """The name of both firewall tables."""
        return f"volant-{self.instance}"

    @property
    def tables(self) -> tuple[str, str]:
        """Both tables with their families: `bridge` filters frames, `inet` filters packets."""
        return f"bridge {self.table}", f"inet {self.table}"

    @property
    def passt_table(self) -> str:
        """The table that filters passt, with its family."""
        return f"inet {self.table}-user"

    @property
    def egress_table(self) -> str:
        """The table of VMs with an egress policy, with its family."""
        return f"inet {self.table}-egress"


class Tap(msgspec.Struct, frozen=True, kw_only=True):
    """The data of a VM on the bridge."""

    vm_id: int
    name: str
    mac: str
    address: str
    network: str
    """The named network whose members it reaches; empty for none."""
    ports: tuple[PublishedPort, ...]
    restricted: bool = False
    """Whether it has an egress policy, so that it uses the daemon's DNS."""


class NetworkPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the host should have."""

    settings: NetworkSettings
    gateways: tuple[IPv4Interface, ...]
    """The bridge's addresses: the gateway of the subnet, and the gateways of VMs that were created in an earlier
    subnet."""
    taps: tuple[Tap, ...]
    """The taps, ordered by VM id."""

    @property
    def localnet(self) -> bool:
        """Whether a port is published on a loopback address."""
        return any(port.host.startswith(("127.", "0.0.0.0")) for tap in self.taps for port in tap.ports)


def needs_tap(row: VmRow) -> bool:
    """Returns whether a VM has, or is about to have, a process with a NIC on the bridge."""
    return row.lease is not None and bool(row.lease.tap and row.tag) and row.phase not in (Phase.KILL, Phase.REMOVE)


def plan_of(settings: NetworkSettings, rows: Iterable[VmRow]) -> NetworkPlan:
    """Derives the plan."""
    gateways = {f"{gateway_of(settings.subnet)}/{settings.subnet.prefixlen}"}
    taps = []
    for row in sorted(filter(needs_tap, rows), key=lambda row: row.id):
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
                restricted=is_restricted(row.egress),
            )
        )
    return NetworkPlan(settings=settings, gateways=tuple(sorted(map(IPv4Interface, gateways))), taps=tuple(taps))


def may_be_ours(settings: NetworkSettings, name: str) -> bool:
    """Returns whether the daemon gives such names to links."""
    return name == settings.bridge_name or name.startswith(tap_prefix(settings.instance))


def is_ours(settings: NetworkSettings, link: Link) -> bool:
    """Returns whether the daemon created a link, under these settings or earlier ones."""
    return is_tap(settings, link) or (link.kind == "bridge" and link.mac == settings.bridge_mac)


def is_tap(settings: NetworkSettings, link: Link) -> bool:
    """Returns whether a link is a tap created by the daemon."""
    return link.kind == "tun" and len(link.name) == _NAME_BYTES and link.name.startswith(tap_prefix(settings.instance))


def steps_to(plan: NetworkPlan, links: Collection[Link]) -> list[Step]:
    """Returns the steps from `links`, which are all links of the host, to the plan. A tap without a VM is kept while a
    process has it open, as that may be a VM to be adopted.

    :raises NetworkFailed: another program has created an interface with the bridge's name.
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
    """Returns the step that creates or corrects the bridge."""
    return MakeBridge(
        name=plan.settings.bridge_name,
        mac=plan.settings.bridge_mac,
        addresses=tuple(str(gateway) for gateway in plan.gateways),
    )


def make_tap(plan: NetworkPlan, tap: Tap) -> MakeTap:
    """Returns the step that creates or corrects a VM's tap."""
    return MakeTap(name=tap.name, bridge=plan.settings.bridge_name)


def check_bridge(settings: NetworkSettings, links: Iterable[Link]) -> None:
    """Checks the bridge. :raises NetworkFailed: another program has created an interface with the bridge's name."""
    for link in links:
        if link.name == settings.bridge_name and not is_ours(settings, link):
            raise NetworkFailed(
                "bridge_taken",
                f"this daemon did not make the existing network interface {link.name}; give the bridge another name "
                "(VOLANT_BRIDGE), or remove the interface",
            )


def check_subnets(plan: NetworkPlan, routes: Sequence[Route], links: Iterable[Link]) -> None:
    """Checks that no route of the host overlaps with a subnet. Subnets that the bridge already has are not checked, as
    refusing them would help no VM.

    :param links: links of the host, the bridge among them
    :raises NetworkFailed: when a route overlaps.
    """
    bridges = {link.name for link in links if is_ours(plan.settings, link)}
    ours = {IPv4Network(route.destination) for route in routes if route.device in bridges}
    subnets = [gateway.network for gateway in plan.gateways if gateway.network not in ours]
    for route in routes:
        destination = IPv4Network(route.destination)
        if route.device in bridges or destination.prefixlen < _DEFAULT_ROUTE_BITS:
            continue
        for subnet in subnets:
            if subnet.overlaps(destination):
                raise NetworkFailed(
                    "subnet_in_use",
                    f"the subnet {subnet} is in use: this host has the route {route}; give the daemon another subnet "
                    "(VOLANT_SUBNET), or remove the route",
                )
