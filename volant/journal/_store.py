"""What of the journal outlives its actor."""

from __future__ import annotations

from pathlib import Path

import msgspec
import trio

from volant.host import Host
from volant.model import Networking

from ._events import EventLog
from ._figures import Figures
from ._projection import Projection
from ._responses import StoredResponses


class Retention(msgspec.Struct, frozen=True):
    """How long events are kept: both bounds hold, and the newest event always stays."""

    max_events: int = 1_000_000
    max_age_s: float = 7 * 86400.0


class Store:
    """The database's path, and what is read of it without asking anybody. Built once for a daemon.

    `projection`, `events` and `responses` are empty until the `Journal` has started for the first time, and go on over
    its restarts.
    """

    def __init__(
        self, host: Host, path: Path, *, retention: Retention | None = None, networking: Networking | None = None
    ) -> None:
        self.host = host
        self.path = path
        self.retention = retention or Retention()
        self.networking = networking or Networking()
        """By which VMs that are created get their networks and leases."""
        self.projection = Projection()
        self.events = EventLog(host, path)
        self.responses = StoredResponses()
        self.figures = Figures()
        self.trouble: str | None = None
        """Why no change can be made at present; None: they can. The journal sets it."""
        self.damage: str | None = None
        """What was found wrong with the database while it is in use; None: nothing."""
        self.lost: str | None = None
        """What had been acknowledged and is not in the database, found when it was opened; None: nothing."""
        self.ids_taken = 0
        """No VM gets an id up to this one: the host has traces of VMs of which the database may not know."""
        self.replaced = trio.Event()
        """Set once another database is to be taken: this daemon's tree ends, and the next one begins with that."""
