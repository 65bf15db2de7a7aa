"""From where files that manifests name may come.

Who can install a plugin makes the daemon fetch what its manifest names, and must not reach through the daemon what they
can't reach themselves: services that listen for this host and its network alone, metadata services of clouds, files.
So a name is resolved first, each address that it has is checked, and the connection goes to the very address that was
checked: a name that means another host a moment later gains nothing. Each redirection is checked likewise.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ._errors import ImageError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_METADATA = frozenset(map(ipaddress.ip_address, ("168.63.129.16", "192.0.0.192")))
"""Azure's, which looks like a public address, and Oracle's, which earlier versions of Python take for one. Other
clouds' are link-local, private or shared (100.64.0.0/10)."""


class Origins(NamedTuple):
    """What may be fetched besides files on the public internet."""

    directories: tuple[Path, ...] = ()
    """Local files below these."""
    networks: tuple[Network, ...] = ()
    """Addresses of these, though they are not public."""
    anywhere: bool = False
    """Everything: somebody fetches with rights of their own."""


PUBLIC = Origins()
ANYWHERE = Origins(anywhere=True)


def parse_networks(members: Sequence[str]) -> tuple[Network, ...]:
    """Networks such as `10.1.0.0/16`, and addresses. :raises ValueError: one is neither."""
    return tuple(ipaddress.ip_network(member) for member in members)


def connect(host: str, port: int, timeout_s: float, origins: Origins) -> socket.socket:
    """Connects to the first address of a name that answers, if the name has none that is refused.

    :raises ImageError: `media_refused`
    :raises OSError: nobody answers
    """
    failure = OSError("it has no address")
    for family, address in checked(host, port, origins):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure


def checked(
    host: str, port: int, origins: Origins, *, must_exist: bool = True
) -> list[tuple[socket.AddressFamily, Any]]:
    """The addresses of a name, of which all may be connected to.

    :raises ImageError: `media_refused`: one may not, or there is no such name. The text is the same, so that nobody
        learns which names there are in a network of their own.
    :raises OSError: the name can't be looked up at present
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise
        found = []
    except UnicodeError:
        found = []
    if (must_exist and not found) or not all(is_allowed(str(address[0]), origins) for *_, address in found):
        raise ImageError(
            "media_refused",
            f"{host[:100]} has no public address",
            "upload the file with `volar plugins upload`, or name the network of its server in artifact_allow_cidr",
        )
    return [(family, address) for family, _, _, _, address in found]


def is_allowed(text: str, origins: Origins) -> bool:
    """Returns whether an address may be connected to."""
    if origins.anywhere:
        return True
    # A link-local address may carry its interface.
    address: _Address = ipaddress.ip_address(text.partition("%")[0])
    meant = _embedded(address)
    if any(each in network for network in origins.networks for each in (address, meant)):
        return True
    elsewhere = meant.is_multicast or meant.is_reserved or (meant.version == 6 and meant.is_site_local)
    return meant.is_global and not elsewhere and meant not in _METADATA and not _is_own(meant)


def _embedded(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 address stands for, else the address."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64 or int(address) >> 32 == 0:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_own(address: _Address) -> bool:
    """Whether it is one of this host's: what listens there may be meant for this host alone."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        # Nothing is sent by this; the kernel chooses the way there, and with it our own address.
        sock.connect((str(address), 9))
        if sock.getsockname()[0] == str(address):
            return True
    # For a second address of an interface the kernel chooses the first. But only what is ours can be bound.
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((str(address), 0))
        return not _binds_any(address.version)
    return False


def _binds_any(version: int) -> bool:
    """Whether this host lets sockets be bound to addresses that are not its own."""
    try:
        return Path(f"/proc/sys/net/ipv{version}/ip_nonlocal_bind").read_text().strip() != "0"
    except OSError:
        return False
