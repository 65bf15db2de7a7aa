"""Lifecycle events. Each change of a VM's status has exactly one (contract: Events); two types are about copies."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from ._row import Reason, Status, VmRow
from ._text import Time


class EventType(StrEnum):
    """Types of events. Public."""

    VM_CREATED = "VM_CREATED"
    VM_STARTING = "VM_STARTING"
    VM_RUNNING = "VM_RUNNING"
    VM_PAUSED = "VM_PAUSED"
    VM_STOPPING = "VM_STOPPING"
    VM_STOPPED = "VM_STOPPED"
    VM_CRASHED = "VM_CRASHED"
    VM_DELETED = "VM_DELETED"
    VM_FORKED = "VM_FORKED"
    """Copies were made of the VM. Its status stays."""
    VM_RESTORED = "VM_RESTORED"
    """A VM that continues from a snapshot runs for the first time. Follows its `VM_RUNNING`."""


class EventId(msgspec.Struct, frozen=True, order=True):
    """`<epoch>-<seq>`. The epoch changes with a new or restored database; `seq` begins at 1 and has no holes."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> EventId | None:
        """Returns None when `text` is not an event id, which counts as an unknown id."""
        epoch, dash, seq = text.rpartition("-")
        if not dash or not epoch or not seq.isascii() or not seq.isdecimal() or len(seq) > 18:
            return None
        return cls(epoch, int(seq))


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `data` of one server-sent event."""

    type: EventType
    id: str
    name: str
    vm_id: int
    status: Status | None
    """None once the VM is deleted."""
    ip_address: str
    timestamp: Time
    message: str
    reason: Reason | None = None
    labels: dict[str, str] = {}
    """For filters."""
    copies: tuple[str, ...] = ()
    """With `VM_FORKED`: the names of the new VMs."""
    snapshot: str | None = None
    """With `VM_RESTORED`: the name of the snapshot."""
    caller: str | None = None
    """The client that requested the change: its address and key, or its user at a Unix socket."""


_ENTERING: dict[Status, EventType] = {
    Status.PENDING: EventType.VM_CREATED,
    Status.STARTING: EventType.VM_STARTING,
    Status.RUNNING: EventType.VM_RUNNING,
    Status.PAUSED: EventType.VM_PAUSED,
    Status.STOPPING: EventType.VM_STOPPING,
    Status.STOPPED: EventType.VM_STOPPED,
    Status.CRASHED: EventType.VM_CRASHED,
    Status.DELETING: EventType.VM_STOPPING,
}


def event_for(
    before: VmRow | None,
    after: VmRow | None,
    *,
    event_id: EventId,
    message: str,
    now: datetime,
    caller: str | None = None,
) -> Event | None:
    """Returns the event of a change, or None when the public status stays.

    `before` None: the VM is created. `after` None: it is deleted. :raises ValueError: both are None.
    """
    row = after or before
    if row is None:
        raise ValueError("a change needs a row before or after it")
    if before is not None and after is not None and before.status is after.status:
        return None
    if after is None:
        return _event(EventType.VM_DELETED, row, event_id, now, message, status=None, caller=caller)
    reason = after.reason if after.status is Status.CRASHED else None
    return _event(
        _ENTERING[after.status], row, event_id, now, message, status=after.status, reason=reason, caller=caller
    )


def forked_event(
    row: VmRow, copies: tuple[str, ...], *, event_id: EventId, now: datetime, caller: str | None = None
) -> Event:
    """Returns the event of a VM of which copies were made."""
    message = f"forked: {', '.join(copies[:5])}" + (f" and {len(copies) - 5} more" if len(copies) > 5 else "")
    return _event(EventType.VM_FORKED, row, event_id, now, message, status=row.status, copies=copies, caller=caller)


def restored_event(before: VmRow | None, after: VmRow | None, *, event_id: EventId, now: datetime) -> Event | None:
    """Returns the event of a VM that now runs from a snapshot, if the change is that."""
    if before is None or after is None or before.checkpoint is None or after.checkpoint is not None:
        return None
    origin = after.origin
    if origin is None or origin.kind != "snapshot" or after.status is not Status.RUNNING:
        return None
    message = f"goes on from snapshot {origin.snapshot} of VM {origin.vm}"
    return _event(EventType.VM_RESTORED, after, event_id, now, message, status=after.status, snapshot=origin.snapshot)


def _event(
    of: EventType, row: VmRow, event_id: EventId, now: datetime, message: str, *, status: Status | None, **more: Any
) -> Event:
    return Event(
        type=of,
        id=str(event_id),
        name=row.name,
        vm_id=row.id,
        status=status,
        ip_address=row.ip_address,
        timestamp=now,
        message=message,
        labels=row.labels,
        **more,
    )
