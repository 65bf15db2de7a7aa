"""What the daemon answers, beside the types of `volant.model`. Members that a newer daemon adds are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from volant.model import VmView


class Health(msgspec.Struct, frozen=True):
    """The answer of `GET /healthz`."""

    status: Literal["ok", "starting", "stopping", "degraded"]


class SystemStatus(msgspec.Struct, frozen=True):
    """The answer of `GET /api/v1/system/status`."""

    status: str
    vm_count: int
    vms: dict[str, int]
    """How many VMs are in each status."""
    cpu_percent: float
    """Of the whole host."""
    mem_percent: float
    version: str
    uptime_s: float


class PluginView(msgspec.Struct, frozen=True):
    """A plugin as the API lists it."""

    name: str
    version: str = ""
    description: str = ""
    runtime: str = ""
    enabled: bool = True
    builtin: bool = False
    created_at: datetime | None = None
    labels: dict[str, str] = {}


class Waited(msgspec.Struct, frozen=True):
    """How a wait ended."""

    outcome: Literal["met", "failed", "timeout"]
    """`failed`: the VM came to rest in another state, or is deleted."""
    vm: VmView | None
    """As it was at the end of the wait; None when the name was free already."""


class StreamGap(msgspec.Struct, frozen=True):
    """Events between what was asked for and `oldest` are lost to this reader."""

    type: Literal["STREAM_GAP"]
    requested: str
    oldest: str
    newest: str


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a VM's log."""

    name: str
    vm_id: int
    stream: Literal["stdout", "stderr", "console"]
    line: str
    timestamp: datetime
    seq: int
    partial: bool = False
    """The line goes on in the next one of its stream."""


class Range(msgspec.Struct, frozen=True):
    """Both ends belong to it."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")


class LogGap(msgspec.Struct, frozen=True):
    """Lines with these numbers are past retention and lost to this reader."""

    gap: Range
