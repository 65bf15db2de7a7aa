"""What the API uses of the rest of the daemon, handed in."""

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
    """What VMs with an egress policy were denied."""
    recorder: Recorder
    fleet: Fleet | None = None
    """None: the host is in no fleet."""
