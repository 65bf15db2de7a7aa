"""The settings of the HTTP server: who may send requests, and the limits of clients."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from ._addresses import Network
from ._caller_limits import CallerLimits
from ._subjects import Subject

MIB = 1024 * 1024


class Limits(msgspec.Struct, frozen=True):
    """Limits of the HTTP server. Times in seconds, sizes in bytes."""

    connections: int = 2000
    """Maximum open connections. For another one, the connection that was idle longest is closed; if none is idle, the
    answer is 503."""
    connections_of_one: int = 1500
    """Maximum open connections of one address, with the same rule. The rest is for others."""
    unread: int = 64 * MIB
    """Maximum size of all unread answers together. Above it, the client whose answer waits longest is cut off, clients
    without access first."""
    keep_alive_s: float = 60.0
    """How long a connection may be idle between two requests, and before its first."""
    handshake_s: float = 10.0
    """Maximum time from the connection to the end of the TLS handshake."""
    handshakes: int = 256
    """Maximum concurrent TLS handshakes. For another one, the oldest is cut."""
    header_s: float = 10.0
    """Maximum time from the first byte of a request to the end of its headers; then 408."""
    header_bytes: int = 32 * 1024
    """Maximum size of request line and headers together; more is 431."""
    heads_per_pass: int = 64 * 1024
    """Maximum bytes of heads parsed in one pass of the event loop, over all connections in rotation."""
    requests: int = 100_000
    """The number of requests after which a connection is closed."""
    send_s: float = 300.0
    """A client that reads less than 64 KiB in this time, or acknowledges nothing, is cut off."""
    finish_s: float = 10.0
    """Maximum time for the work after the last byte of an answer: dropping the rest of a body, closing or recycling."""
    drop_bytes: int = 128 * MIB
    drop_s: float = 5.0
    """How long an unread body is read and dropped, so that the client sees the answer. For a client without access,
    `linger_s` applies."""
    linger_s: float = 1.0
    linger_bytes: int = MIB
    """Maximum bytes that are read after the server has closed its direction, so that the kernel does not reset the sent
    data."""
    grace_s: float = 1.0
    """Maximum time from the request to stop to the end of the last connection."""
    lifespan_s: float = 5.0
    inbox_bytes: int = 64 * 1024
    """Maximum bytes that a client can send ahead of its handler."""
    websocket_message: int = 64 * 1024
    """Maximum size of a message from a client that the daemon decodes. Relays don't decode."""
    json_body: int = MIB
    bodies: int = 16 * MIB
    """Maximum size of all JSON bodies together that are being read or served. A decoded body may take fifty times its
    size."""
    small_body: int = 4 * 1024
    """The part of each body that does not count for `bodies`."""


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The settings that decide which requests are allowed."""

    addresses: tuple[str, ...] = ()
    """The addresses on which it listens, as `http://127.0.0.1:7777`, `https://…` or `unix:/path`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides loopback and the listen address that are allowed in `Host`; without a port, with any port."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the API."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """API keys, one of which clients must send; without any, no key is required."""
    subjects: tuple[Subject, ...] = ()
    """Roles of client certificates. If there are any, clients must present a certificate or a key."""
    allow_cidr: tuple[Network, ...] = ()
    """Networks whose requests are accepted; without any, all networks."""
    trusted_proxies: tuple[Network, ...] = ()
    """Proxies whose `X-Forwarded-For` is trusted."""
    caller_limits: CallerLimits = field(default_factory=CallerLimits)
    """The limits of each named key and certificate."""
