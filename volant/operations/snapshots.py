"""Snapshots: copies of VMs that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from volant.journal import SnapshotTaken
from volant.model import Snapshot, SnapshotView, TakeSnapshot, check_take, no_such_snapshot, snapshot_view

from ._context import Context
from ._lookup import find_vm
from ._permission import Permission
from ._table import TABLE, Tool


@TABLE.operation(
    "POST /api/v1/vms/{name}/snapshots",
    permission=Permission.CONTROL,
    status=201,
    answer="The snapshot, `ready` and on the disk",
    errors=(409, 503),
    idempotent=True,
    tool=Tool(
        "vms_snapshot",
        "Keep a VM as it is now",
        "Keep a copy of a running or paused VM, memory and disk, on the host, to go back to it with vms_restore, also "
        "after the VM is deleted. Take one before something that may break the VM.",
    ),
    client="snapshots.take",
    client_timeout_s=600,
)
async def take_snapshot(context: Context, name: str, *, body: TakeSnapshot) -> SnapshotTaken:
    """Keep a VM as it is now: memory, devices and disk.

    The guest is paused for a moment, and what is copied then is written to the disk while it runs again. A client that
    leaves cancels nothing. The VM has to be running or paused; a command that ends that ends this too.
    """
    check_take(body)
    take = partial(context.deps.vms.copies.take_snapshot, find_vm(context.deps, name).name, body, key=context.key)
    return SnapshotTaken.of(await take())


@TABLE.operation(
    "GET /api/v1/vms/{name}/snapshots",
    permission=Permission.VIEW,
    answer="The oldest first",
    client="snapshots.list_of_vm",
)
async def list_vm_snapshots(context: Context, name: str) -> list[SnapshotView]:
    """List the snapshots of a VM."""
    vm_id = find_vm(context.deps, name).id
    return _by_age(one for one in context.deps.store.projection.snapshots.values() if one.vm.id == vm_id)


@TABLE.operation("GET /api/v1/snapshots", permission=Permission.VIEW, answer="The oldest first")
async def list_snapshots(context: Context) -> list[SnapshotView]:
    """List all snapshots, also those of deleted VMs."""
    return _by_age(context.deps.store.projection.snapshots.values())


@TABLE.operation("GET /api/v1/snapshots/{snapshot}", permission=Permission.VIEW, answer="The snapshot")
async def get_snapshot(context: Context, snapshot: str) -> SnapshotView:
    """Get a snapshot."""
    found = context.deps.store.projection.snapshots.get(snapshot)
    if found is None:
        raise no_such_snapshot(snapshot)
    return snapshot_view(found)


@TABLE.operation(
    "DELETE /api/v1/snapshots/{snapshot}",
    permission=Permission.CONTROL,
    answer="Nothing of it is left",
    errors=(409, 503),
    tool=Tool(
        "snapshots_delete",
        "Delete a snapshot",
        "Destroy a snapshot, for good. VMs that were made from it keep running.",
        destructive=True,
        idempotent=True,
    ),
)
async def remove_snapshot(context: Context, snapshot: str) -> None:
    """Remove a snapshot; VMs made from it keep running."""
    await context.deps.vms.copies.remove_snapshot(snapshot)


def _by_age(snapshots: Iterable[Snapshot]) -> list[SnapshotView]:
    return [snapshot_view(one) for one in sorted(snapshots, key=lambda one: (one.created_at, one.name))]
