"""Lifecycle events. Each change of a VM's status has exactly one (contract: Events). Five types are about copies, and
four about the workload of a running VM.

Events about OCI images share the sequence and have a stream of their own.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from ._audit import Cause
from ._project import DEFAULT_PROJECT
from ._row import Origin, Reason, Status, Status as S, VmRow, WorkloadView, visible_workload
from ._snapshot import Snapshot
from ._text import Time, first_few

TRANSITIONS: frozenset[tuple[S | None, S | None]] = frozenset(
    {
        (None, S.PENDING),
        (None, S.STOPPED),
        (None, S.CRASHED),
        (S.PENDING, S.STARTING),
        (S.PENDING, S.STOPPED),
        (S.PENDING, S.DELETING),
        (S.STARTING, S.RUNNING),
        (S.STARTING, S.STOPPING),
        (S.STARTING, S.CRASHED),
        (S.STARTING, S.DELETING),
        (S.RUNNING, S.PAUSED),
        (S.RUNNING, S.STOPPING),
        (S.RUNNING, S.CRASHED),
        (S.RUNNING, S.DELETING),
        (S.PAUSED, S.RUNNING),
        (S.PAUSED, S.STOPPING),
        (S.PAUSED, S.CRASHED),
        (S.PAUSED, S.DELETING),
        (S.STOPPING, S.STOPPED),
        (S.STOPPING, S.DELETING),
        (S.STOPPED, S.STARTING),
        (S.STOPPED, S.DELETING),
        (S.CRASHED, S.STARTING),
        (S.CRASHED, S.STOPPED),
        (S.CRASHED, S.DELETING),
        (S.DELETING, None),
    }
)
"""The legal transitions. `None` means that the VM does not exist."""


class IllegalTransition(Exception):
    """The table has no such transition."""


def check_transition(before: S | None, after: S | None) -> None:
    """Checks a transition. :raises IllegalTransition: a VM can't go from `before` to `after`. Staying is always
    legal."""
    if before is not after and (before, after) not in TRANSITIONS:
        raise IllegalTransition(f"a VM can't go from {before or 'nothing'} to {after or 'nothing'}")


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
    VM_REPLICA_FAILED = "VM_REPLICA_FAILED"
    """Other hosts get no newer replica of the VM, or too few of them do. Its status stays, and the replication is
    retried."""
    SNAPSHOT_TAKEN = "SNAPSHOT_TAKEN"
    """A snapshot of the VM is `ready`. Its status stays."""
    SNAPSHOT_DELETED = "SNAPSHOT_DELETED"
    """A snapshot of the VM is deleted. The VM itself may be deleted."""
    SNAPSHOT_PUSHED = "SNAPSHOT_PUSHED"
    """A snapshot is completely in a registry."""
    SNAPSHOT_PULLED = "SNAPSHOT_PULLED"
    """A snapshot from a registry is `ready`. Its VM was never on this host."""
    WORKLOAD_STARTED = "WORKLOAD_STARTED"
    """The workload's program runs, for the first time in this boot or again. Copies of the VM have this event too."""
    WORKLOAD_READY = "WORKLOAD_READY"
    """The workload is healthy. Without a health check, it counts as healthy once its program runs."""
    WORKLOAD_EXITED = "WORKLOAD_EXITED"
    """The workload has exited with 0 and is not restarted."""
    WORKLOAD_FAILED = "WORKLOAD_FAILED"
    """The workload has failed or could not be started, and is not restarted."""
    IMAGE_PULL_STARTED = "IMAGE_PULL_STARTED"
    """The layers of an image are being fetched, for a request or a VM."""
    IMAGE_PULL_PROGRESS = "IMAGE_PULL_PROGRESS"
    """Progress of a fetch, at most 19 times."""
    IMAGE_PULLED = "IMAGE_PULLED"
    """The image is in the cache."""
    IMAGE_PULL_FAILED = "IMAGE_PULL_FAILED"

    @property
    def is_of_image(self) -> bool:
        """Whether the event is about an OCI image, not about a VM."""
        return self.startswith("IMAGE_")


VM_EVENTS = tuple(kind for kind in EventType if not kind.is_of_image)
IMAGE_EVENTS = tuple(kind for kind in EventType if kind.is_of_image)


class EventId(msgspec.Struct, frozen=True, order=True):
    """`<epoch>-<seq>`. The epoch changes with a new or restored database; `seq` begins at 1 and has no holes."""

    epoch: str
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> EventId | None:
        """Returns the event id in `text`; None if it is malformed, which counts as an unknown id."""
        epoch, dash, seq = text.rpartition("-")
        if not dash or not epoch or not seq.isascii() or not seq.isdecimal() or len(seq) > 18:
            return None
        return cls(epoch, int(seq))


class ImageFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The facts of an event about a fetch of an OCI image."""

    reference: str
    digest: str
    done_bytes: int = 0
    total_bytes: int = 0
    """The size of the layers that the cache lacked, as the registry stores them."""
    layers_done: int = 0
    """The number of layers fetched and converted."""
    layers_total: int = 0
    """The number of layers that the cache lacked."""
    bytes_per_s: int = 0
    """The rate during the last seconds, with `IMAGE_PULL_PROGRESS`."""
    code: str = ""
    """The error code, with `IMAGE_PULL_FAILED`."""


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `data` of one server-sent event."""

    type: EventType
    id: str
    name: str
    """The VM's name; empty for events about images."""
    vm_id: int
    """The VM's id; 0 for events about images."""
    status: Status | None
    """The VM's status; null once the VM is deleted."""
    ip_address: str
    timestamp: Time
    message: str
    reason: Reason | None = None
    labels: dict[str, str] = {}
    """The VM's labels, for filters."""
    copies: tuple[str, ...] = ()
    """With `VM_FORKED`: the names of the new VMs."""
    origin: Origin | None = None
    """With `VM_CREATED` and `VM_DELETED`: the guest that the VM is a copy of; left out if it is no copy."""
    snapshot: str | None = None
    """With `VM_RESTORED` and events of snapshots: the name of the snapshot."""
    snapshot_id: str | None = None
    """With events of snapshots: its id, which is never used again."""
    reference: str | None = None
    """With `SNAPSHOT_PUSHED` and `SNAPSHOT_PULLED`: its reference in the registry."""
    paused_ms: float | None = None
    """With `VM_FORKED` and events of snapshots: how long the VM was paused for the copy."""
    created_at: Time | None = None
    """With `VM_DELETED` and events of snapshots: when the VM or the snapshot was created."""
    workload: WorkloadView | None = None
    """With `WORKLOAD_STARTED` and the other workload events: the workload's state."""
    caller: str | None = None
    """The client that requested the change: its address and key, or its user at a Unix socket."""
    request_id: str | None = None
    """The id of that client's request, as in the audit log."""
    image: ImageFacts | None = None
    """The facts of a fetch, only in events about images."""
    project: str = DEFAULT_PROJECT
    """The project of the VM, or the project that requested the image; left out if it is `default`."""


_UP = (Status.RUNNING, Status.PAUSED)
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
    cause: Cause | None = None,
) -> Event | None:
    """Returns the event of a change; None if the public status stays.

    `before` is None when the VM is created, `after` is None when it is deleted. :raises ValueError: both are None.
    """
    row = after or before
    if row is None:
        raise ValueError("a change needs a row before or after it")
    if before is not None and after is not None and before.status is after.status:
        return None
    if after is None:
        return _event(
            EventType.VM_DELETED, row, event_id, now, message,
            status=None, origin=row.origin, created_at=row.created_at, **_of(cause),
        )  # fmt: skip
    origin = after.origin if before is None else None
    reason = after.reason if after.status is Status.CRASHED else None
    return _event(
        _ENTERING[after.status], row, event_id, now, message,
        status=after.status, reason=reason, origin=origin, **_of(cause),
    )  # fmt: skip


def forked_event(
    row: VmRow,
    copies: tuple[str, ...],
    paused_ms: float | None,
    *,
    event_id: EventId,
    now: datetime,
    cause: Cause | None = None,
) -> Event:
    """Returns the event of a VM that was copied."""
    message = f"forked: {first_few(copies)}"
    return _event(
        EventType.VM_FORKED, row, event_id, now, message,
        status=row.status, copies=copies, paused_ms=paused_ms, **_of(cause),
    )  # fmt: skip


def snapshot_event(
    of: EventType,
    snapshot: Snapshot,
    vm: VmRow | None,
    *,
    event_id: EventId,
    now: datetime,
    cause: Cause | None = None,
    reference: str | None = None,
) -> Event:
    """Returns the event of a snapshot.

    :param vm: the row of its VM; None if that is deleted
    :param reference: its name in a registry
    """
    done = of.removeprefix("SNAPSHOT_").lower()
    where = {EventType.SNAPSHOT_PUSHED: f" to {reference}", EventType.SNAPSHOT_PULLED: f" from {reference}"}
    return _event(
        of, vm or snapshot.vm, event_id, now, f"snapshot {snapshot.name} was {done}{where.get(of, '')}",
        status=None if vm is None else vm.status,
        reference=reference,
        snapshot=snapshot.name,
        snapshot_id=snapshot.id,
        paused_ms=snapshot.paused_ms,
        created_at=snapshot.created_at,
        **_of(cause),
    )  # fmt: skip


def replica_event(before: VmRow | None, after: VmRow | None, *, event_id: EventId, now: datetime) -> Event | None:
    """Returns the event of a VM that could not be replicated; None if the change is another one, or the reason is the
    same as last time."""
    if before is None or after is None or after.replica is None or after.replica.reason is None:
        return None
    known, reason = None if before.replica is None else before.replica.reason, after.replica.reason
    if known is not None and known.code == reason.code:
        return None
    message = f"not replicated as it should be: {reason.message}"
    return _event(EventType.VM_REPLICA_FAILED, after, event_id, now, message, status=after.status, reason=reason)


def restored_event(before: VmRow | None, after: VmRow | None, *, event_id: EventId, now: datetime) -> Event | None:
    """Returns the event of a VM that now runs from a snapshot; None if the change is another one."""
    if before is None or after is None or before.checkpoint is None or after.checkpoint is not None:
        return None
    origin = after.origin
    if origin is None or origin.kind != "snapshot" or after.status is not Status.RUNNING or after.arrived:
        return None
    message = f"continues from snapshot {origin.snapshot} of VM {origin.vm}"
    return _event(EventType.VM_RESTORED, after, event_id, now, message, status=after.status, snapshot=origin.snapshot)


def workload_events(before: VmRow | None, after: VmRow | None) -> list[tuple[EventType, str]]:
    """Returns the types of a change's workload events, in order, and their texts.

    They follow from the two states that the agent has reported. States in between are unknown: a guest may change its
    state at any rate, and the daemon reads the newest report at most ten times a second.
    """
    now = visible_workload(after) if after is not None and after.status in _UP else None
    if now is None:
        return []
    earlier = visible_workload(before) if before is not None and before.status in _UP else None
    found = []
    started = _has_started(now) and (
        earlier is None
        or not _has_started(earlier)
        or now.restarts != earlier.restarts
        or (now.pid is not None and earlier.pid is not None and now.pid != earlier.pid)
    )
    if started:
        again = f" again, restarts: {now.restarts}" if now.restarts else ""
        found.append((EventType.WORKLOAD_STARTED, f"the workload was started{again}"))
    if started or earlier is None or earlier.state != now.state:
        match now.state:
            case "healthy":
                found.append((EventType.WORKLOAD_READY, "the workload is ready"))
            case "exited":
                found.append((EventType.WORKLOAD_EXITED, "the workload has ended with exit code 0"))
            case "failed":
                why = now.error or "it has not said why"
                found.append((EventType.WORKLOAD_FAILED, f"the workload has failed: {why}"))
    return found


def workload_event(of: EventType, row: VmRow, message: str, *, event_id: EventId, now: datetime) -> Event:
    """Returns one of the events that `workload_events` names, for the row after the change."""
    return _event(of, row, event_id, now, message, status=row.status, workload=row.workload)


def _has_started(workload: WorkloadView) -> bool:
    """Returns whether the workload's program has run at all. A program that does not exist has not."""
    return (
        workload.pid is not None
        or workload.restarts > 0
        or workload.state in ("healthy", "unhealthy", "exited")
        or workload.exit_code is not None
        or workload.signal is not None
    )


def image_event(
    of: EventType, image: ImageFacts, message: str, *, project: str, event_id: EventId, now: datetime
) -> Event:
    """Returns an event about an OCI image that a project has requested."""
    return Event(
        type=of,
        id=str(event_id),
        name="",
        vm_id=0,
        status=None,
        ip_address="",
        timestamp=now,
        message=message,
        image=image,
        project=project,
    )


def _of(cause: Cause | None) -> dict[str, str]:
    return {} if cause is None else {"caller": str(cause.caller), "request_id": cause.request_id}


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
        project=row.project,
        **more,
    )
