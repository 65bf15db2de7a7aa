"""What the API uses of the rest of the daemon, handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Literal, Protocol

import msgspec

from actors import Ref
from volant.host import Host
from volant.http import Access
from volant.journal import Backups, Journal, Store, VmLogs
from volant.vm import Vms

from ._permission import Permission

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


class ApiDeps(msgspec.Struct, frozen=True, kw_only=True):
    """What operations and their adapters use of the daemon."""

    vms: Vms
    journal: Ref[Journal]
    store: Store
    logs: VmLogs
    backups: Backups
    host: Host
    system: DaemonInfo
    access: Access
    allows: Callable[[str | None, Permission], bool] = lambda caller, permission: True
    """Whether a caller has a permission. Whoever has a key has all of them."""
