"""The settings of access control."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._networks import Network


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """What of the daemon's settings decides who may ask."""

    addresses: tuple[str, ...] = ()
    """Where it listens, as `http://127.0.0.1:7777` or `unix:/path`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides loopback and the listen address that are allowed in `Host`; without a port, with any port."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the API."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Clients must send one of these; without any, no key is needed."""
    allow_cidr: tuple[Network, ...] = ()
    """Networks from which requests are taken; without any, from all."""
    trusted_proxies: tuple[Network, ...] = ()
    """Proxies whose `X-Forwarded-For` counts."""
