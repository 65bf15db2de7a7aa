"""What the API uses of the rest of the daemon, handed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from actors import Ref
from volant.host import Host
from volant.journal import Backups, Journal, Store, VmLogs
from volant.vm import Vms

from ._networks import Network

Health = Literal["ok", "starting", "stopping", "degraded"]


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """What of the daemon's settings the API depends on."""

    addresses: tuple[str, ...] = ()
    """Where it listens, as `http://127.0.0.1:7777` or `unix:/path`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides loopback and the listen address that may stand in `Host`, with a port or for any."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the API."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Of which clients must show one; without any nobody is asked."""
    allow_cidr: tuple[Network, ...] = ()
    """Networks from which requests are taken; without any, from all."""
    trusted_proxies: tuple[Network, ...] = ()
    """Proxies whose `X-Forwarded-For` counts."""


class SystemDoor(Protocol):
    """The daemon, as far as it tells about itself."""

    started_at: datetime
    adoption_s: float | None
    """How long it took at the start to take up the VMs there were; None until that is done."""

    def health(self) -> Health:
        """`ok` when the supervisor tree is whole."""

    def tree(self) -> Mapping[str, object]:
        """The supervisor tree, ready for JSON."""

    def info(self) -> Mapping[str, object]:
        """Addresses, versions, accelerator and why, ready for JSON."""


@dataclass(frozen=True, kw_only=True)
class Doors:
    """Refs and doors of the API."""

    vms: Vms
    journal: Ref[Journal]
    store: Store
    logs: VmLogs
    backups: Backups
    host: Host
    system: SystemDoor
    settings: ApiSettings = field(default_factory=ApiSettings)
