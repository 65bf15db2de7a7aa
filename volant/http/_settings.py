"""The settings of access control."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._caller_limits import CallerLimits
from ._networks import Network
from ._subjects import Subject


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
