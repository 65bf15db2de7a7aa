"""The dependencies of the API on the rest of the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

from volant.egress import EgressActivity
from volant.host import Host
from volant.http import Access
from volant.identity import NamedKeys
from volant.journal import Backups, JournalRef, Recorder, Store
from volant.logs import VmLogs
from volant.oci import ImageLibrary
from volant.transfer import Transfers
from volant.vm import Vms

if TYPE_CHECKING:
    # Few hosts are in a fleet.
    from volant.fleet import Fleet

Health = Literal["ok", "starting", "stopping", "degraded"]


class DaemonInfo(Protocol):
    """The daemon's information about itself."""

    started_at: datetime
    adoption_s: float | None
    """How long the adoption of VMs took at the start; None until it is done."""

    def health(self) -> Health:
        """Returns `ok` if the supervisor tree is healthy."""

    def tree(self) -> Mapping[str, object]:
        """Returns the supervisor tree, ready for JSON."""

    def info(self) -> Mapping[str, object]:
        """Returns addresses, versions, and the accelerator with the reason for it, ready for JSON."""


class ApiDeps(msgspec.Struct, frozen=True, kw_only=True):
    """The dependencies of operations and their adapters."""

    vms: Vms
    journal: JournalRef
    store: Store
    logs: VmLogs
    backups: Backups
    host: Host
    oci: ImageLibrary
    transfers: Transfers
    system: DaemonInfo
    access: Access
    keys: NamedKeys
    egress: EgressActivity
    """Denied connections of VMs with an egress policy."""
    recorder: Recorder
    fleet: Fleet | None = None
    """None if the host is in no fleet."""
