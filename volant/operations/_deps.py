"""What the API uses of the rest of the daemon, handed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from actors import Ref
from volant.host import Host
from volant.http import ApiSettings
from volant.journal import Backups, Journal, Store, VmLogs
from volant.vm import Vms

Health = Literal["ok", "starting", "stopping", "degraded"]


class DaemonInfo(Protocol):
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
class ApiDeps:
    """Refs and deps of the API."""

    vms: Vms
    journal: Ref[Journal]
    store: Store
    logs: VmLogs
    backups: Backups
    host: Host
    system: DaemonInfo
    settings: ApiSettings = field(default_factory=ApiSettings)
