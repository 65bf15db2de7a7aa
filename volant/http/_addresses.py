"""Addresses of clients, networks in the settings, and origins of ports in guests."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

import msgspec
import trio

from volant.model.addresses import holder, is_loopback, plain_address

# Origins of their own for servers in guests: `{port}-{id}.localhost`, or below a name of `*.` in `allowed_hosts`.
#
# A browser keeps origins apart: scripts, cookies and storage of one server in a guest are neither those of the daemon
# nor those of another guest. The id of a VM is never used again, so what a browser has kept of one VM (a service
# worker, say) is never in another one's way. A name in place of the id only leads there.


LOCAL = "localhost"
"""The domain whose names browsers resolve to loopback (RFC 6761, 6.3)."""
ANY_BELOW = "*."

_HOST = re.compile(
    r"(?P<port>[1-9][0-9]{0,4})-(?P<vm>[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)"
    r"\.(?P<domain>(?P<name>[^:]+)(:(?P<ours>[0-9]{0,5}))?)\Z"
)


class PortOrigin(msgspec.Struct, frozen=True):
    """A port of a VM, from the `Host` of a request."""

    port: int
    vm: str
    """The VM's id or name."""
    domain: str
    """The rest of the host, such as `localhost:7777`."""


def domains_of(allowed_hosts: Iterable[str]) -> frozenset[str]:
    """Returns the names below which ports have origins."""
    return frozenset({LOCAL, *(name.removeprefix(ANY_BELOW) for name in allowed_hosts if name.startswith(ANY_BELOW))})


def parse_port_origin(host: str, domains: frozenset[str]) -> PortOrigin | None:
    """Returns the port of a VM that a `Host` in lower case names; None for other hosts."""
    found = _HOST.match(host)
    if found is None or found["name"] not in domains or max(int(found["port"]), int(found["ours"] or 0)) > 65535:
        return None
    return PortOrigin(int(found["port"]), found["vm"], found["domain"])


# Checks whether a client on this host still has its end of a connection.
#
# TCP shows no difference between a client that has only closed its direction and one that has exited. Over loopback the
# kernel also has the other end: a socket that no process holds any more has no inode.


def is_abandoned(sock: trio.socket.SocketType) -> bool:
    """Returns whether the other end is on loopback, and no process holds it. False if that is unknown."""
    try:
        here, there = sock.getsockname()[:2], sock.getpeername()[:2]
        found = holder(there, here) if is_loopback(there[0]) else None
    except (OSError, ValueError):
        return False
    return found is not None and not found.inode


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_WITH_PORT = re.compile(r"\[([^\]]*)\](?::\d{1,5})?\Z|([0-9.]+):\d{1,5}\Z")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def parse_network(text: str) -> Network:
    """Parses a network such as `192.0.2.0/24` or `2001:db8::/32`, or a single address.

    IPv4 written as IPv6 (`::ffff:192.0.2.0/120`) is that IPv4 network.

    :raises ValueError: it is malformed, or has bits set beyond its prefix; the message is meant for people.
    """
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        try:
            meant = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise ValueError(f"{text!r} is no network; write for instance 192.0.2.0/24 or 2001:db8::/32") from None
        raise ValueError(f"{text!r} has bits set beyond its prefix; is {meant} meant?") from None
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        low = network.network_address.ipv4_mapped
        assert low is not None
        return ipaddress.IPv4Network((low, network.prefixlen - 96))
    return network


def parse_client(text: str) -> Address:
    """Parses the address of a client, as the kernel or a proxy writes it: optionally with a zone, brackets or a port.

    IPv4 over an IPv6 socket becomes IPv4.

    :raises ValueError: it is malformed.
    """
    text = text.strip()
    with_port = _WITH_PORT.match(text)
    if with_port:
        text = with_port[1] or with_port[2] or ""
    return plain_address(text.partition("%")[0])


def is_in(address: Address, networks: Iterable[Network]) -> bool:
    """Returns whether one of `networks` contains `address`."""
    return any(address in network for network in networks)
