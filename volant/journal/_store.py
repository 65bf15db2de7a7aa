"""The state of the journal that outlives its actor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from volant.host import Host
from volant.model import NOTHING_USED, Networking, Used

from ._api_keys import ApiKeys
from ._audit import AuditLog
from ._creates import RecentCreates
from ._events import EventLog
from ._figures import Figures
from ._projection import Projection
from ._responses import StoredResponses


class Retention(msgspec.Struct, frozen=True):
    """The limits for stored events and audit records. All hold, and the newest ones always stay."""

    max_events: int = 1_000_000
    max_age_s: float = 7 * 86400.0
    max_records: int = 1_000_000
    records_max_age_s: float = 90 * 86400.0


class Store:
    """Holds what everybody may read of the journal. Built once for a daemon.

    `projection`, `events`, `audit`, `responses` and `keys` are empty until the `Journal` has started for the first
    time, and survive its restarts.
    """

    def __init__(
        self, host: Host, path: Path, *, retention: Retention | None = None, networking: Networking | None = None
    ) -> None:
        self.host = host
        self.path = path
        self.retention = retention or Retention()
        self.networking = networking or Networking()
        """Decides the networks and leases of new VMs."""
        self.projection = Projection()
        self.events = EventLog(host, path)
        self.audit = AuditLog(host, path)
        self.responses = StoredResponses()
        self.keys = ApiKeys()
        self.creates = RecentCreates()
        self.figures = Figures()
        self.used_elsewhere: Callable[[str], Used] = lambda project: NOTHING_USED
        """What a project has on the other hosts of the fleet, which counts for its limits."""
        self.trouble: str | None = None
        """Why changes are refused at present; None: they are not."""
        self.ids_taken = 0
        """New ids are higher: the host has traces of VMs that the database may not know, or these are other hosts'."""
