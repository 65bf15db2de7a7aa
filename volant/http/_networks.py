"""Addresses of clients, and the networks that an operator names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_WITH_PORT = re.compile(r"\[([^\]]*)\](?::\d{1,5})?\Z|([0-9.]+):\d{1,5}\Z")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def parse_network(text: str) -> Network:
    """A network such as `192.0.2.0/24`, `2001:db8::/32`, or a single address.

    IPv4 written as IPv6 (`::ffff:192.0.2.0/120`) is that IPv4 network.

    :raises ValueError: it is none, or has bits set beyond its prefix; the text is meant for people.
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
    """The address of a client, as the kernel or a proxy writes it: perhaps with a zone, brackets or a port.

    IPv4 that came in over an IPv6 socket is IPv4.

    :raises ValueError: it is no address.
    """
    text = text.strip()
    with_port = _WITH_PORT.match(text)
    if with_port:
        text = with_port[1] or with_port[2] or ""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_in(address: Address, networks: Iterable[Network]) -> bool:
    """Whether one of `networks` has `address`."""
    return any(address in network for network in networks)
