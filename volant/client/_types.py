"""Types of the client that `volant.model` does not have."""

from __future__ import annotations

from typing import Literal

import msgspec

from volant.model import VmView

Command = Literal["start", "stop", "restart", "pause", "resume", "recover"]


class Waited(msgspec.Struct, frozen=True):
    """How a wait ended."""

    outcome: Literal["met", "failed", "timeout"]
    """`failed`: the VM ended in another state, or was deleted."""
    vm: VmView | None
    """The VM at the end of the wait; None if it no longer existed."""


class Reconnected(msgspec.Struct, frozen=True):
    """The connection to a console was lost and is restored; the guest's output in between is in the VM's log."""
