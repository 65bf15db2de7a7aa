"""From where artifacts may be fetched: protection against server-side request forgery.

A client that installs a plugin makes the daemon fetch the manifest's files. It must not reach through the daemon what
it can't reach itself: services of this host and its network, metadata services of clouds, local files. So a name is
resolved, each of its addresses is checked, and the connection goes to a checked address, which also defeats DNS
rebinding. Each redirect is checked in the same way.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from volant.model.addresses import METADATA

from ._errors import ImageError


def local_path(url: str) -> Path | None:
    """Returns the path of a file of this host, or None for other URLs."""
    if url.startswith("/"):
        return Path(url)
    if url.startswith("file://"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    return None


def shown(url: str) -> str:
    """Returns a URL for people, without login and query, which may be secrets."""
    if local_path(url) is not None:
        return url
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_METADATA = tuple(map(ipaddress.ip_network, METADATA))
"""Azure's looks like a public address, and earlier versions of Python take Oracle's for one."""


class Origins(NamedTuple):
    """The allowed origins besides the public internet."""

    directories: tuple[Path, ...] = ()
    """Local files below these directories."""
    networks: tuple[Network, ...] = ()
    """Addresses in these networks, public or not."""
    anywhere: bool = False
    """Everything, for users who fetch with their own rights."""


PUBLIC = Origins()
ANYWHERE = Origins(anywhere=True)


def parse_networks(members: Sequence[str]) -> tuple[Network, ...]:
    """Parses networks such as `10.1.0.0/16`, and addresses. :raises ValueError: a member is neither."""
    return tuple(ipaddress.ip_network(member) for member in members)


def connect(host: str, port: int, timeout_s: float, origins: Origins) -> socket.socket:
    """Connects to the first address of a name that answers.

    :raises ImageError: `artifact_refused`: an address of the name is not allowed
    :raises OSError: no address answers
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
    """Returns the addresses of a name, all of which are allowed.

    :raises ImageError: `artifact_refused`: an address is not allowed, or there is no such name. One error for both, so
        that clients can't find out which names a private network has
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
            "artifact_refused",
            f"{host[:100]} has no public address",
            "upload the file with `volar plugins upload`, or name the network of its server in artifact_allow_cidr",
        )
    return [(family, address) for family, _, _, _, address in found]


def is_allowed(text: str, origins: Origins) -> bool:
    """Returns whether connections to an address are allowed."""
    if origins.anywhere:
        return True
    # A link-local address may carry its interface.
    address: _Address = ipaddress.ip_address(text.partition("%")[0])
    meant = _embedded(address)
    if any(each in network for network in origins.networks for each in (address, meant)):
        return True
    elsewhere = meant.is_multicast or meant.is_reserved or (meant.version == 6 and meant.is_site_local)
    return meant.is_global and not elsewhere and not any(meant in each for each in _METADATA) and not _is_own(meant)


def _embedded(address: _Address) -> _Address:
    """Returns the IPv4 address inside an IPv6 address (RFC 4291, 6052, 3056), else the address."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64 or int(address) >> 32 == 0:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_own(address: _Address) -> bool:
    """Returns whether an address is one of this host's, where services may be for this host only."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        # This sends nothing. The kernel chooses the route, and with it our own address.
        sock.connect((str(address), 9))
        if sock.getsockname()[0] == str(address):
            return True
    # For an interface's second address the kernel chooses the first. But only own addresses can be bound.
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((str(address), 0))
        return not _binds_any(address.version)
    return False


def _binds_any(version: int) -> bool:
    """Returns whether the kernel lets sockets bind to foreign addresses (`ip_nonlocal_bind`)."""
    try:
        return Path(f"/proc/sys/net/ipv{version}/ip_nonlocal_bind").read_text().strip() != "0"
    except OSError:
        return False
