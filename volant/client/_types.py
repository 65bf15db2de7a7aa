"""What the client tells beside the types of `volant.model`."""

from __future__ import annotations

from typing import Literal

import msgspec

from volant.model import VmView

Command = Literal["start", "stop", "restart", "pause", "resume", "recover"]


class Waited(msgspec.Struct, frozen=True):
    """How a wait ended."""

    outcome: Literal["met", "failed", "timeout"]
    """`failed`: the VM came to rest in another state, or is deleted."""
    vm: VmView | None
    """As it was at the end of the wait; None when the name was free already."""


class Reconnected(msgspec.Struct, frozen=True):
    """The connection to a console was lost and is there again; what the guest said meanwhile is in the VM's log."""
