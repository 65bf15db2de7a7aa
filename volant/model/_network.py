"""Networks of VMs: leases, names and published ports. Everything about a VM's network follows from its row alone, also
after a crash."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import Annotated, Literal, NamedTuple

import msgspec

from ._problem import Problem, contradictory, invalid
from ._project import DEFAULT_PROJECT, Key
from ._text import Name, Time, check_name

NONE, BRIDGE, USER = "none", "bridge", "user"
KINDS = (NONE, BRIDGE, USER)
"""The values of `network` besides the names of networks."""
AUTO = "auto"
"""A value only of the setting: the first of bridge, user and none that the host supports."""

USER_ADDRESS, USER_PREFIX, USER_GATEWAY = "10.0.2.15", 24, "10.0.2.2"
"""The lease of each VM with the network `user`. Only the VM's passt sees these addresses."""

DEFAULT_SUBNET = IPv4Network("192.168.127.0/24")
MAX_PORTS = 64
"""Maximum published ports per VM."""
MAX_NETWORKS = 1000
"""Maximum named networks."""

_ANY_HOST = "0.0.0.0"
_PORT_TEXT = re.compile(r"(?:([0-9.]{7,15}):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?\Z")
_TAP_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_INSTANCE_DIGITS, _ID_DIGITS = 8, 6

_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_BYTE = "([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_HOST = rf"([0-9]|[1-9][0-9]|1[0-9]{{2}}|2[01][0-9]|22[0-3])(\.{_BYTE}){{3}}"
PortText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": rf"^({_HOST}:)?{_PORT}:{_PORT}(/(tcp|udp))?$"})]
"""The pattern is only for the schema; `parse_port` decides."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The address of a VM, and the data that belongs to it."""

    address: str
    prefix: int
    gateway: str
    mac: str
    tap: str
    """The name of its tap, 15 characters; empty if it has no tap."""
    address6: str = ""
    """Not used yet."""


class PublishedPort(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the host that leads to a port of a guest."""

    host: str
    """An IPv4 address of the host; 0.0.0.0 for all of them."""
    host_port: int
    guest_port: int
    protocol: Literal["tcp", "udp"] = "tcp"

    def __str__(self) -> str:
        return f"{self.host}:{self.host_port}:{self.guest_port}/{self.protocol}"

    def conflicts(self, other: PublishedPort) -> bool:
        """Returns whether the host can't publish both."""
        return (self.host_port, self.protocol) == (other.host_port, other.protocol) and (
            self.host == other.host or _ANY_HOST in (self.host, other.host)
        )


class CreateNetwork(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/networks`."""

    name: Name


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The stored state of a named network."""

    name: str
    created_at: datetime
    project: str = DEFAULT_PROJECT

    @property
    def key(self) -> Key:
        """Its project and name."""
        return Key(self.project, self.name)


class NetworkView(msgspec.Struct, frozen=True, kw_only=True):
    """A named network as the API shows it."""

    name: str
    vms: Mapping[str, str]
    """The addresses of its VMs, by name."""
    created_at: Time
    project: str = DEFAULT_PROJECT


def network_view(network: Network, vms: Mapping[str, str] | None = None) -> NetworkView:
    """Returns the view of `network`, with the addresses of its VMs by name."""
    return NetworkView(name=network.name, vms=vms or {}, created_at=network.created_at, project=network.project)


_UNFILTERED = "; its destinations are not filtered, so a guest reaches this host's own addresses: "


class NetworkChoice(NamedTuple):
    """The network of a new VM, and the reason for it."""

    network: str
    reason: str
    fallback: bool = False
    """Whether the daemon runs as root but can't provide a bridge. The creator of the VM is then warned."""


class Networking(msgspec.Struct, frozen=True, kw_only=True):
    """The networks that the daemon can give to new VMs."""

    default: NetworkChoice = NetworkChoice(NONE, "the daemon's setting `network`")
    """The network of a VM whose request names none."""
    subnet: IPv4Network = DEFAULT_SUBNET
    instance: str = "0" * 10
    """Ten hexadecimal digits, a digest of the state directory."""
    obstacles: Mapping[str, str] = {}
    """Why the host does not support `bridge` or `user`, and the fix."""
    user_refused: str = ""
    """Why the daemon's access control forbids the network `user`, and the fix; empty if it is allowed."""
    egress_obstacles: Mapping[str, str] = {}
    """Why this host can't filter the traffic of VMs with the network `bridge` or `user`, and the fix."""
    user_unfiltered: str = ""
    """Why a guest with the network `user` reaches the host's own addresses; empty if it does not."""

    def reason_for(self, reason: str) -> str:
        """Returns why a VM has the network `user`, with a note if passt is not filtered now."""
        plain, _, _ = reason.partition(_UNFILTERED)
        return f"{plain}{_UNFILTERED}{self.user_unfiltered}" if self.user_unfiltered else plain


def kind_of(network: str) -> str:
    """Returns `none`, `bridge` or `user`. A named network is on the bridge."""
    return network if network in KINDS else BRIDGE


def is_named(network: str) -> bool:
    """Returns whether `network` is the name of a network."""
    return network not in KINDS


def chosen_network(network: str | None, default: NetworkChoice) -> NetworkChoice:
    """Returns the network for a request that names `network`."""
    return default if network is None else NetworkChoice(network, "asked for when it was created")


def default_network(setting: str, obstacles: Mapping[str, str], *, is_root: bool = False) -> NetworkChoice:
    """Returns the network of VMs whose requests name none.

    :param setting: the setting `network`
    :param obstacles: why the host does not support a kind of network
    :param is_root: whether the daemon runs as root, so that operators expect a bridge
    """
    if setting != AUTO:
        return NetworkChoice(setting, "the daemon's setting `network`")
    if BRIDGE not in obstacles:
        return NetworkChoice(BRIDGE, "the daemon can set up a bridge")
    if USER not in obstacles:
        return NetworkChoice(USER, f"no bridge: {obstacles[BRIDGE]}", is_root)
    return NetworkChoice(NONE, f"no bridge: {obstacles[BRIDGE]}; no network of a user: {obstacles[USER]}", is_root)


def unavailable(choice: NetworkChoice, obstacle: str, *, vm: str) -> Problem:
    """Returns the 503 for a host that does not support the VM's network."""
    return Problem(
        503,
        "network-unavailable",
        f"VM {vm!r} can't have the network {choice.network!r} ({choice.reason}): {obstacle}",
        field="network",
        vm=vm,
        hint="create it with network `none`, or remove the obstacle and restart the daemon",
    )


def refused(reason: str, *, vm: str) -> Problem:
    """Returns the 409 for the network `user` when it would bypass the daemon's access control."""
    return Problem(
        409,
        "network-refused",
        f"VM {vm!r} can't have the network 'user': {reason}",
        field="network",
        vm=vm,
        hint="set an API key (VOLANT_API_KEY), or create the VM with network `bridge` or `none`",
    )


def check_ports_free(project: str, ports: Iterable[PublishedPort], others: Iterable[tuple[Key, PublishedPort]]) -> None:
    """Checks that no other VM publishes a port.

    :param project: the VM's project, which sees no names of other projects
    :param others: published ports, each with its VM
    :raises Problem: 409, a port is taken.
    """
    taken: dict[tuple[int, str], list[tuple[Key, PublishedPort]]] = {}
    for vm, other in others:
        taken.setdefault((other.host_port, other.protocol), []).append((vm, other))
    for port in ports:
        for vm, other in taken.get((port.host_port, port.protocol), ()):
            if port.conflicts(other):
                whose = f"VM {vm.name!r}" if vm.project == project else "another VM"
                raise Problem(
                    409,
                    "port-taken",
                    f"port {port.host_port}/{port.protocol} of {port.host} already leads to {whose}",
                    field="ports",
                    hint="publish another port of the host, or delete that VM",
                )


def new_network(request: CreateNetwork, *, project: str = DEFAULT_PROJECT, now: datetime) -> Network:
    """Returns a new named network. :raises Problem: 400, the name is invalid or is a kind of network."""
    check_name(request.name, "name")
    if not is_named(request.name):
        raise invalid("name", f"{request.name!r} is a kind of network, and can't be the name of one")
    return Network(name=request.name, created_at=now, project=project)


def no_such_network(name: str, *, field: str | None = None) -> Problem:
    """Returns the 404 for the name of a network."""
    return Problem(
        404,
        "network-not-found",
        f"there is no network named {name[:80]!r}",
        field=field,
        hint="`volar networks list` shows all networks, `volar networks create` creates one",
    )


def parse_subnet(text: str) -> IPv4Network:
    """Parses a subnet for guests, from /8 to /30. :raises ValueError: the message says what is wrong."""
    try:
        subnet = IPv4Network(text)
    except ValueError as error:
        raise ValueError(
            f"subnet {text[:40]!r} is not an IPv4 subnet ({error}); use for example {DEFAULT_SUBNET}"
        ) from None
    if not 8 <= subnet.prefixlen <= 30:
        raise ValueError(f"subnet {subnet} has a prefix of {subnet.prefixlen} bits, it must be from 8 to 30")
    if not subnet.is_private or subnet.is_loopback or subnet.is_link_local or subnet.is_reserved:
        raise ValueError(f"subnet {subnet} is not private; use for example {DEFAULT_SUBNET}")
    return subnet


def gateway_of(subnet: IPv4Network) -> IPv4Address:
    """Returns the gateway's address, the first of the subnet."""
    return subnet.network_address + 1


def capacity_of(subnet: IPv4Network) -> int:
    """Returns the number of guests that fit: all addresses except the subnet's own, the gateway's and the broadcast
    address."""
    return subnet.num_addresses - 3


def allocate(
    subnet: IPv4Network, taken: Collection[str], *, instance: str, vm_id: int, above: str | None = None
) -> Lease:
    """Returns a lease with the lowest free address.

    :param taken: the addresses in use, best as a set
    :param above: an address up to which all are taken
    :raises Problem: 503, all are taken.
    """
    first = int(gateway_of(subnet) if above is None else IPv4Address(above)) + 1
    last = int(subnet.broadcast_address) - 1
    # Among one more address than are taken, one is free.
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
    """Returns the lease of a VM with the network `user`."""
    return Lease(address=USER_ADDRESS, prefix=USER_PREFIX, gateway=USER_GATEWAY, mac=mac_of(instance, vm_id), tap="")


def moved(lease: Lease, instance: str, vm_id: int) -> Lease:
    """Returns the lease with the MAC and tap name of this daemon, after a move from another host."""
    return msgspec.structs.replace(lease, mac=mac_of(instance, vm_id), tap=tap_of(instance, vm_id) if lease.tap else "")


def mac_of(instance: str, vm_id: int) -> str:
    """Returns the MAC of a VM: two bytes of the instance and three of the id. MACs repeat after 16 million VMs."""
    octets = bytes([0x02]) + bytes.fromhex(instance[:4]) + (vm_id & 0xFFFFFF).to_bytes(3, "big")
    return octets.hex(":")


def tap_of(instance: str, vm_id: int) -> str:
    """Returns the name of a VM's tap: 15 characters, the limit of Linux."""
    return tap_prefix(instance) + _base36(vm_id % 36**_ID_DIGITS, _ID_DIGITS)


def tap_prefix(instance: str) -> str:
    """Returns the prefix of this daemon's taps, which contains the whole instance."""
    return "v" + _base36(int(instance, 16), _INSTANCE_DIGITS)


def _dotted(number: int) -> str:
    # Five times faster than IPv4Address, as it is called for each address that is taken.
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def _base36(number: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        number, digit = divmod(number, 36)
        text = _TAP_DIGITS[digit] + text
    return text


def parse_port(text: str, field: str = "ports") -> PublishedPort:
    """Parses `[host:]host_port:guest_port[/tcp|udp]`; defaults are 127.0.0.1 and TCP. :raises Problem: 400."""
    match = _PORT_TEXT.match(text)
    if match is None:
        raise invalid(
            field,
            f"{field} has {text[:80]!r}, which is not [host:]host_port:guest_port[/tcp|udp]",
            hint="use for example 8080:80 or 0.0.0.0:5353:53/udp; the host is an IPv4 address",
        )
    host, host_port, guest_port, protocol = match.groups()
    try:
        address = IPv4Address(host or "127.0.0.1")
    except AddressValueError:
        raise invalid(field, f"{field} has {text[:80]!r}, and {host!r} is not an IPv4 address") from None
    if address.is_multicast or (address.is_reserved and not address.is_unspecified):
        raise invalid(field, f"{field} has {text[:80]!r}, and {host!r} can't be an address of the host")
    for port in (int(host_port), int(guest_port)):
        if not 1 <= port <= 65535:
            raise invalid(field, f"{field} has {text[:80]!r}, and {port} is not a port from 1 to 65535")
    return PublishedPort(
        host=str(address),
        host_port=int(host_port),
        guest_port=int(guest_port),
        protocol="udp" if protocol == "udp" else "tcp",
    )


def parse_ports(texts: Iterable[str]) -> tuple[PublishedPort, ...]:
    """Parses published ports. :raises Problem: 400, one is malformed or there are too many; 422, two conflict."""
    ports: list[PublishedPort] = []
    for text in texts:
        port = parse_port(text)
        for other in ports:
            if port.conflicts(other):
                raise contradictory("ports", f"ports has {other} and {port}, and the host can't have both")
        ports.append(port)
        if len(ports) > MAX_PORTS:
            raise invalid("ports", f"a VM can publish at most {MAX_PORTS} ports")
    return tuple(ports)
