"""The settings of the serving edge: who may send requests, and what a client can cost us."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ._addresses import Network
from ._caller_limits import CallerLimits
from ._subjects import Subject

MIB = 1024 * 1024


class Limits(msgspec.Struct, frozen=True):
    """Bounds of the serving edge. Times in seconds, sizes in bytes."""

    connections: int = 2000
    """Open connections. For one more, the one that was idle longest is closed; if none is idle, the answer is 503."""
    connections_of_one: int = 1500
    """Open connections of one address, as above. Others get the rest."""
    unread: int = 64 * MIB
    """All answers together that their clients have not read. For more, the client whose answer waits longest is cut
    off, one without access first."""
    keep_alive_s: float = 60.0
    """How long a connection may be idle between two requests, and before its first."""
    handshake_s: float = 10.0
    """From the connection to the end of the TLS handshake."""
    handshakes: int = 256
    """TLS handshakes at once. For one more, the oldest is cut."""
    header_s: float = 10.0
    """From the first byte of a request to the end of its headers; then 408."""
    header_bytes: int = 32 * 1024
    """Request line and headers together; more is 431."""
    heads_per_pass: int = 64 * 1024
    """Bytes of heads that are parsed in one pass of the event loop, of all connections in rotation."""
    requests: int = 100_000
    """After so many a connection is closed."""
    send_s: float = 300.0
    """A client that reads less than 64 KiB in this time is cut off, and one that acknowledges nothing."""
    finish_s: float = 10.0
    """For what follows the last byte of an answer: dropping the rest of a body, closing or recycling."""
    drop_bytes: int = 128 * MIB
    drop_s: float = 5.0
    """How much of an unread body is read and dropped, so that the client sees our answer; of one that was not let in,
    for `linger_s`."""
    linger_s: float = 1.0
    linger_bytes: int = MIB
    """What is still read after we have closed our direction, so that the kernel does not reset what we sent."""
    grace_s: float = 1.0
    """From the request to stop to the end of the last connection."""
    lifespan_s: float = 5.0
    inbox_bytes: int = 64 * 1024
    """What a client can send ahead of its handler."""
    websocket_message: int = 64 * 1024
    """The largest message from a client where we decode it. Relays don't."""
    json_body: int = MIB
    bodies: int = 16 * MIB
    """All JSON bodies together that are being read or served. Decoded a body may take fifty times its size."""
    small_body: int = 4 * 1024
    """The part of each body that does not count for `bodies`."""


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The settings that decide which requests are allowed."""

    addresses: tuple[str, ...] = ()
    """The addresses that it listens on, as `http://127.0.0.1:7777`, `https://…` or `unix:/path`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides loopback and the listen address that are allowed in `Host`; without a port, with any port."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the API."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Clients must send one of these; without any, no key is needed."""
    subjects: tuple[Subject, ...] = ()
    """Roles of client certificates. With some, clients must show a certificate or a key."""
    allow_cidr: tuple[Network, ...] = ()
    """Networks whose requests are accepted; without any, all are."""
    trusted_proxies: tuple[Network, ...] = ()
    """Proxies whose `X-Forwarded-For` is trusted."""
    caller_limits: CallerLimits = field(default_factory=CallerLimits)
    """Of each key and certificate that people hand out."""
