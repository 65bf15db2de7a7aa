"""Decides what the rows of a backup become: the present of a VM counts more than the backup.

See the table in docs/explanation/journal.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from volant.model import (
    Desired,
    Phase,
    Problem,
    ProcessIdentity,
    Project,
    Secret,
    Snapshot,
    Status,
    VmRow,
    Volume,
    first_few,
    moved,
)

from ._database import Loaded
from ._named import Named


class Running(msgspec.Struct, frozen=True):
    """A running hypervisor of this daemon."""

    boot: int
    """The number of its VM's boot."""
    identity: ProcessIdentity
    serial_socket: str | None = None
    """The socket of its console."""


class Evidence(msgspec.Struct, frozen=True):
    """The VMs of which the host has traces, independent of any database."""

    newest_id: int = 0
    """The highest id of a VM with a process, a log or a disk."""
    running: Mapping[int, Running] = {}
    """The running hypervisors, by the id of their VM."""


class Change(msgspec.Struct, frozen=True):
    """A row that replaces the one in the backup."""

    before: VmRow
    after: VmRow


def merge(
    backup: Loaded, present: Sequence[VmRow], running: Mapping[int, Running], instance: str, *, replace: bool
) -> list[Change]:
    """Returns the rows of a backup that change, as the present of a VM counts more.

    Addresses stay: a VM has one for life, so no VM of the backup has the address of a present one.

    :param instance: names this daemon; another one may have made the backup
    :raises Problem: 409 VMs would lose their rows, unless `replace`; 409 an id belongs to two VMs.
    """
    kept = {row.id: row for row in backup.rows}
    clashes = [
        f"{row.id} ({row.name!r} here, {kept[row.id].name!r} in the backup)"
        for row in present
        if row.id in kept and not _same(row, kept[row.id])
    ]
    if clashes:
        raise Problem(
            409,
            "restore-clash",
            f"these ids belong to other VMs in the backup: {first_few(clashes)}",
            hint="it was made by another daemon; delete these VMs first",
        )
    lost = [row.name for row in present if row.id not in kept]
    if lost and not replace:
        raise Problem(
            409,
            "restore-loses-vms",
            f"the backup does not know these VMs: {first_few(lost)}",
            hint="delete them; or use `replace`: their processes go on and are listed as orphans",
        )
    now = {row.id: row for row in present}
    changes = []
    for row in backup.rows:
        after = now.get(row.id) or _as_it_runs(row, running.get(row.id), instance)
        if after != row:
            changes.append(Change(row, after))
    return changes


def _same(one: VmRow, other: VmRow) -> bool:
    return (one.key, one.created_at) == (other.key, other.created_at)


def _as_it_runs(row: VmRow, running: Running | None, instance: str) -> VmRow:
    """Returns the row with the process that exists on the host, independent of the backup. A process of a later boot
    than in the backup is the VM: another boot would run it twice."""
    same = running is not None and running.identity.tag == row.tag
    row = msgspec.structs.replace(
        row,
        process=None,
        serial_socket=None,
        lease=None if row.lease is None else moved(row.lease, instance, row.id),
        tag=_own_tag(row, instance),
    )
    if running is None:
        return row
    if not same:
        row = msgspec.structs.replace(
            row,
            status=Status.RUNNING,
            desired=Desired.RUNNING if row.desired is Desired.STOPPED else row.desired,
            phase=Phase.PAUSE if row.desired is Desired.PAUSED else Phase.NONE,
            reason=None,
            boots=running.boot,
            booted=row.generation,
            agent_seen=True,
        )
    return msgspec.structs.replace(
        row, tag=running.identity.tag, process=running.identity, serial_socket=running.serial_socket
    )


def _own_tag(row: VmRow, instance: str) -> str:
    """Returns the process tag that this daemon gives to the current boot of the row. No other daemon's process has this
    tag."""
    if not row.tag:
        return ""
    boot = row.boots + 1 if row.phase is Phase.LAUNCH else max(1, row.boots)
    return f"volant-{instance}-{row.id}.{boot}"


def named_after(backup: Loaded, present: Iterable[Named]) -> list[Named]:
    """Returns the named objects that replace those of a backup:

    - the backup's snapshots, without their process data;
    - the current snapshots and volumes, as their files are the current ones;
    - the current projects, to which the current keys refer;
    - the current secrets, which may have been replaced for a reason.
    """
    kept = [
        msgspec.structs.replace(one, vm=msgspec.structs.replace(one.vm, process=None, serial_socket=None, tag=""))
        for one in backup.named
        if isinstance(one, Snapshot)
    ]
    return [*kept, *(one for one in present if isinstance(one, Snapshot | Volume | Project | Secret))]
