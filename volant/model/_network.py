"""Networks of VMs: leases, names, published ports. What follows from a row follows from it alone, so that two who ask
say the same."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import Annotated, Literal, NamedTuple

import msgspec

from ._problem import Problem, contradictory, invalid
from ._text import Name, Time, check_name

NONE, BRIDGE, USER = "none", "bridge", "user"
KINDS = (NONE, BRIDGE, USER)
"""What `network` can be besides a network's name."""
AUTO = "auto"
"""The setting alone: what is best of those that can be had."""

USER_ADDRESS, USER_PREFIX, USER_GATEWAY = "10.0.2.15", 24, "10.0.2.2"
"""What each VM with a network of its own process has: nobody but that process ever sees it."""

DEFAULT_SUBNET = IPv4Network("192.168.127.0/24")
MAX_PORTS = 64
"""That one VM publishes."""
MAX_NETWORKS = 1000
"""Named ones."""

_ANY_HOST = "0.0.0.0"
_PORT_TEXT = re.compile(r"(?:([0-9.]{7,15}):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?\Z")
_TAP_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_INSTANCE_DIGITS, _ID_DIGITS = 8, 6

_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_BYTE = "([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_HOST = rf"([0-9]|[1-9][0-9]|1[0-9]{{2}}|2[01][0-9]|22[0-3])(\.{_BYTE}){{3}}"
PortText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^({_HOST}:)?{_PORT}:{_PORT}(/(tcp|udp))?$"})]
"""For the schema alone, as `parse_port` decides."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The address of a VM, and what follows from its having one."""

    address: str
    prefix: int
    gateway: str
    mac: str
    tap: str
    """The name of its network device on the host, 15 characters; empty: it has none there."""
    address6: str = ""
    """None is given yet."""


class PublishedPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the host that leads to one of a guest."""

    host: str
    """An IPv4 address of the host; 0.0.0.0: all of them."""
    host_port: int
    guest_port: int
    protocol: Literal["tcp", "udp"] = "tcp"

    def __str__(self) -> str:
        return f"{self.host}:{self.host_port}:{self.guest_port}/{self.protocol}"

    def meets(self, other: PublishedPort) -> bool:
        """Whether the host can't have both."""
        return (self.host_port, self.protocol) == (other.host_port, other.protocol) and (
            self.host == other.host or _ANY_HOST in (self.host, other.host)
        )


class CreateNetwork(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/networks`."""

    name: Name


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """What must survive about a named network. Kept only by the journal."""

    name: str
    created_at: datetime


class NetworkView(msgspec.Struct, frozen=True, kw_only=True):
    """A named network as the API shows it."""

    name: str
    vms: Mapping[str, str]
    """The VMs in it: address by name."""
    created_at: Time


def network_view(network: Network, vms: Mapping[str, str] | None = None) -> NetworkView:
    """Returns what clients see of `network`, with the addresses of its VMs by name."""
    return NetworkView(name=network.name, vms=vms or {}, created_at=network.created_at)


_UNFILTERED = "; its destinations are not filtered, so a guest reaches this host's own addresses: "


class Asked(NamedTuple):
    """What network a VM is to have, and why."""

    network: str
    reason: str
    fallback: bool = False
    """Whether it is a lesser one than a daemon of root gives, so that who creates the VM is warned."""


class Networking(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon gives VMs that are created."""

    default: Asked = Asked(NONE, "the daemon's setting `network`")
    """The network of a VM that says nothing, and why."""
    subnet: IPv4Network = DEFAULT_SUBNET
    instance: str = "0" * 10
    """Ten hexadecimal digits that tell this state directory from every other one."""
    obstacles: Mapping[str, str] = {}
    """Why a kind of network, `bridge` or `user`, can't be had here, and what to do."""
    user_refused: str = ""
    """Why the network `user` is refused by the daemon's own protection, and what to do; empty: it is not."""
    user_unfiltered: str = ""
    """Why a guest with the network `user` reaches the host's own addresses; empty: it does not."""

    def reason_for(self, reason: str) -> str:
        """Why a VM has the network `user`, with what is to be known of it now."""
        plain, _, _ = reason.partition(_UNFILTERED)
        return f"{plain}{_UNFILTERED}{self.user_unfiltered}" if self.user_unfiltered else plain


def kind_of(network: str) -> str:
    """`none`, `bridge` or `user`: what is behind a VM's NIC. A named network is on the bridge."""
    return network if network in KINDS else BRIDGE


def is_named(network: str) -> bool:
    """Whether `network` is the name of one, and no kind."""
    return network not in KINDS


def asked_network(network: str | None, default: Asked) -> Asked:
    """The network of a VM that is created with `network`."""
    return default if network is None else Asked(network, "asked for when it was created")


def default_network(setting: str, obstacles: Mapping[str, str], *, is_root: bool = False) -> Asked:
    """The network of VMs that are created without a word, where the setting `network` is `setting`.

    :param obstacles: why a kind of network can't be had here
    :param is_root: whether a bridge is what an operator expects: for others there is none on any host
    """
    if setting != AUTO:
        return Asked(setting, "the daemon's setting `network`")
    if BRIDGE not in obstacles:
        return Asked(BRIDGE, "the daemon may make a bridge")
    if USER not in obstacles:
        return Asked(USER, f"no bridge: {obstacles[BRIDGE]}", is_root)
    return Asked(NONE, f"no bridge: {obstacles[BRIDGE]}; no network of a user: {obstacles[USER]}", is_root)


def unavailable(asked: Asked, obstacle: str, *, vm: str) -> Problem:
    """503: this host can't have what the VM is to have."""
    return Problem(
        503,
        "network-unavailable",
        f"VM {vm!r} can't have the network {asked.network!r} ({asked.reason}): {obstacle}",
        field="network",
        vm=vm,
        hint="create it with network `none`, or make that possible and restart the daemon",
    )


def refused(reason: str, *, vm: str) -> Problem:
    """409: the network `user` would get a guest round the daemon's protection."""
    return Problem(
        409,
        "network-refused",
        f"VM {vm!r} can't have the network 'user': {reason}",
        field="network",
        vm=vm,
        hint="set an API key (VOLANT_API_KEY), or create the VM with network `bridge` or `none`",
    )


def check_ports_free(ports: Iterable[PublishedPort], others: Iterable[tuple[str, PublishedPort]]) -> None:
    """:param others: those that are published, each with the VM that has it

    :raises Problem: 409 one is taken.
    """
    taken: dict[tuple[int, str], list[tuple[str, PublishedPort]]] = {}
    for vm, other in others:
        taken.setdefault((other.host_port, other.protocol), []).append((vm, other))
    for port in ports:
        for vm, other in taken.get((port.host_port, port.protocol), ()):
            if port.meets(other):
                raise Problem(
                    409,
                    "port-taken",
                    f"port {port.host_port}/{port.protocol} of {port.host} leads to VM {vm!r} already",
                    field="ports",
                    hint="publish another port of the host, or delete that VM",
                )


def new_network(request: CreateNetwork, *, now: datetime) -> Network:
    """:raises Problem: 400 it is no name, or the name of a kind."""
    check_name(request.name, "name")
    if not is_named(request.name):
        raise invalid("name", f"{request.name!r} is a kind of network, and can't be the name of one")
    return Network(name=request.name, created_at=now)


def no_such_network(name: str, *, field: str | None = None) -> Problem:
    """404: there is no network of that name."""
    return Problem(
        404,
        "network-not-found",
        f"there is no network named {name[:80]!r}",
        field=field,
        hint="`volar networks list` shows what there is, `volar networks create` makes one",
    )


def parse_subnet(text: str) -> IPv4Network:
    """The subnet of guests, from /8 to /30. :raises ValueError: with what is wrong."""
    try:
        subnet = IPv4Network(text)
    except ValueError as error:
        raise ValueError(
            f"subnet {text[:40]!r} is no IPv4 subnet ({error}): write for instance {DEFAULT_SUBNET}"
        ) from None
    if not 8 <= subnet.prefixlen <= 30:
        raise ValueError(f"subnet {subnet} has a prefix of {subnet.prefixlen} bits, from 8 to 30 are possible")
    if not subnet.is_private or subnet.is_loopback or subnet.is_link_local or subnet.is_reserved:
        raise ValueError(f"subnet {subnet} is not one for private use: write for instance {DEFAULT_SUBNET}")
    return subnet


def gateway_of(subnet: IPv4Network) -> IPv4Address:
    """The address of the host's end: the first one."""
    return subnet.network_address + 1


def capacity_of(subnet: IPv4Network) -> int:
    """How many guests it carries: without its own, the gateway's and the broadcast's address."""
    return subnet.num_addresses - 3


def allocate(
    subnet: IPv4Network, taken: Collection[str], *, instance: str, vm_id: int, above: str | None = None
) -> Lease:
    """The lowest address that nobody has.

    :param taken: addresses; ask for a set where there are many
    :param above: up to this one all are known to be taken
    :raises Problem: 503 all are taken.
    """
    first = int(gateway_of(subnet) if above is None else IPv4Address(above)) + 1
    last = int(subnet.broadcast_address) - 1
    # One more than are taken: one of them is free.
    for number in range(first, min(last, first + len(taken)) + 1):
        address = _dotted(number)
        if address not in taken:
            return Lease(
                address=address,
                prefix=subnet.prefixlen,
                gateway=str(gateway_of(subnet)),
                mac=mac_of(instance, vm_id),
                tap=tap_of(instance, vm_id),
            )
    capacity = capacity_of(subnet)
    raise Problem(
        503,
        "subnet-full",
        f"all {capacity} addresses of the subnet {subnet} are taken",
        field="network",
        hint="delete a VM, create this one with network `none`, or give the daemon a larger subnet (VOLANT_SUBNET)",
    )


def user_lease(instance: str, vm_id: int) -> Lease:
    """What a VM with network `user` has, whatever others have."""
    return Lease(address=USER_ADDRESS, prefix=USER_PREFIX, gateway=USER_GATEWAY, mac=mac_of(instance, vm_id), tap="")


def moved(lease: Lease, instance: str, vm_id: int) -> Lease:
    """The lease with the names that another daemon has for it, if that is another one."""
    return msgspec.structs.replace(lease, mac=mac_of(instance, vm_id), tap=tap_of(instance, vm_id) if lease.tap else "")


def mac_of(instance: str, vm_id: int) -> str:
    """The MAC address of a VM: two bytes of the instance, three of the id, so no two VMs of one daemon share one until
    16 million have been created in between."""
    octets = bytes([0x02]) + bytes.fromhex(instance[:4]) + (vm_id & 0xFFFFFF).to_bytes(3, "big")
    return octets.hex(":")


def tap_of(instance: str, vm_id: int) -> str:
    """The name of a VM's tap. Exactly 15 characters, as many as Linux takes."""
    return tap_prefix(instance) + _base36(vm_id % 36**_ID_DIGITS, _ID_DIGITS)


def tap_prefix(instance: str) -> str:
    """What the names of all taps of this daemon begin with, and no others: `v`, and the whole of the instance."""
    return "v" + _base36(int(instance, 16), _INSTANCE_DIGITS)


def _dotted(number: int) -> str:
    # A fifth of what IPv4Address takes, and asked for each address that is taken.
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def _base36(number: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        number, digit = divmod(number, 36)
        text = _TAP_DIGITS[digit] + text
    return text


def parse_port(text: str, field: str = "ports") -> PublishedPort:
    """`[host:]host_port:guest_port[/tcp|udp]`, on 127.0.0.1 and TCP without a word. :raises Problem: 400."""
    match = _PORT_TEXT.match(text)
    if match is None:
        raise invalid(
            field,
            f"{field} has {text[:80]!r}, which is not [host:]host_port:guest_port[/tcp|udp]",
            hint="write for instance 8080:80 or 0.0.0.0:5353:53/udp; the host is an IPv4 address",
        )
    host, host_port, guest_port, protocol = match.groups()
    try:
        address = IPv4Address(host or "127.0.0.1")
    except AddressValueError:
        raise invalid(field, f"{field} has {text[:80]!r}, and {host!r} is no IPv4 address") from None
    if address.is_multicast or (address.is_reserved and not address.is_unspecified):
        raise invalid(field, f"{field} has {text[:80]!r}, and {host!r} can't be an address of the host")
    for port in (int(host_port), int(guest_port)):
        if not 1 <= port <= 65535:
            raise invalid(field, f"{field} has {text[:80]!r}, and {port} is no port: from 1 to 65535")
    return PublishedPort(
        host=str(address),
        host_port=int(host_port),
        guest_port=int(guest_port),
        protocol="udp" if protocol == "udp" else "tcp",
    )


def parse_ports(texts: Iterable[str]) -> tuple[PublishedPort, ...]:
    """:raises Problem: 400 one is none, or there are too many; 422 two meet."""
    ports: list[PublishedPort] = []
    for text in texts:
        port = parse_port(text)
        for other in ports:
            if port.meets(other):
                raise contradictory("ports", f"ports has {other} and {port}, and the host can't have both")
        ports.append(port)
        if len(ports) > MAX_PORTS:
            raise invalid("ports", f"a VM publishes at most {MAX_PORTS} ports")
    return tuple(ports)
