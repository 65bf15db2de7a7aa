"""Snapshots: stored copies of VMs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from volant.journal import SnapshotTaken
from volant.model import (
    Permission,
    PullSnapshot,
    PushSnapshot,
    RegistrySnapshot,
    Snapshot,
    SnapshotView,
    TakeSnapshot,
    TransferView,
    check_take,
    no_such_snapshot,
    snapshot_view,
)
from volant.transfer import Client

from ._context import Context
from ._images import admit_image, image_problems, registry_auth
from ._lookup import find_vm, require_project
from ._spans import Spans
from ._table import TABLE, Tool

_TRANSFER_S = 6 * 3600 + 60.0
"""The daemon's own deadline, and more."""


@TABLE.operation(
    "POST /api/v1/vms/{name}/snapshots",
    permission=Permission.CONTROL,
    status=201,
    answer="The snapshot, `ready` and on the disk",
    errors=(409, 503),
    idempotent=True,
    tool=Tool(
        "vms_snapshot",
        "Take a snapshot of a VM",
        "Save the memory and disk of a running or paused VM on the host, to return to this state with vms_restore, "
        "even after the VM is deleted. Take one before an action that may break the VM.",
    ),
    client="snapshots.take",
    client_timeout_s=600,
    journaled=True,
    examples={"A name": {"name": "prepared", "description": "All packages are installed"}},
)
async def take_snapshot(context: Context, name: str, *, body: TakeSnapshot) -> SnapshotTaken:
    """Save a VM's present memory, devices and disk.

    The guest is paused briefly, and the copy is written to the disk while it runs again. The snapshot continues if the
    client disconnects. The VM must be running or paused; a command that ends this state also ends the snapshot.
    """
    check_take(body)
    take = partial(context.deps.vms.copies.take_snapshot, context.named(name), body, key=context.key)
    return SnapshotTaken.of(await take())


@TABLE.operation(
    "GET /api/v1/vms/{name}/snapshots",
    permission=Permission.VIEW,
    answer="The snapshots, oldest first",
    client="snapshots.list_of_vm",
)
async def list_vm_snapshots(context: Context, name: str) -> list[SnapshotView]:
    """List the snapshots of a VM."""
    vm_id = find_vm(context.deps, context.named(name)).id
    return _by_age(one for one in context.deps.store.projection.snapshots.values() if one.vm.id == vm_id)


@TABLE.operation(
    "GET /api/v1/snapshots",
    permission=Permission.VIEW,
    answer="The snapshots, oldest first",
    spans=Spans(SnapshotView, lambda one: (one.created_at, one.project, one.name)),
    tool=Tool(
        title="List snapshots",
        description="List the snapshots that were taken with vms_snapshot, newest first.",
        only={"vm": "vm"},
        last_first=True,
    ),
)
async def list_snapshots(context: Context) -> list[SnapshotView]:
    """List all snapshots, including those of deleted VMs. Replicas are not listed, as they belong to their VMs."""
    listed = context.listed
    snapshots = context.deps.store.projection.snapshots.values()
    return _by_age(one for one in snapshots if listed in (None, one.project))


@TABLE.operation(
    "POST /api/v1/snapshots/pull",
    permission=Permission.CONTROL,
    status=201,
    answer="The snapshot, `ready` and on the disk",
    errors=(403, 404, 409, 422, 503, 507),
    registry_auth=True,
    idempotent=True,
    tool=Tool(
        "snapshots_pull",
        "Fetch a snapshot",
        "Fetch a snapshot from a registry to this host, to make VMs from it with vms_restore. It may take minutes. If "
        "the call is interrupted, call it again to continue the transfer.",
    ),
    client_timeout_s=_TRANSFER_S,
    examples={"A tag": {"reference": "registry.example.com:5000/team/app:1"}},
)
async def pull_snapshot(context: Context, *, body: PullSnapshot) -> SnapshotTaken:
    """Fetch a snapshot from a registry, and wait until it is on the disk.

    Chunks that this host already has are not fetched: those of its template, of other snapshots of the project, and of
    an earlier call. The transfer ends if the client disconnects. The files that the snapshot needs are matched by
    digest. A missing OCI image is fetched; the error names any other missing file.
    """
    require_project(context.deps, context.project)
    client = await _client(context, body.reference, body.registry_secret)

    async def admit(snapshot: Snapshot) -> None:
        image = snapshot.vm.manifest.image
        if image is not None and await context.deps.oci.find(image.digest, context.project) is None:
            await admit_image(context, image.reference)

    pull = partial(context.deps.transfers.pull, body.reference, body.name, client, admit, key=context.key)
    with image_problems("reference"):
        return SnapshotTaken.of(await context.unless_stopping(pull))


@TABLE.operation(
    "POST /api/v1/snapshots/{snapshot}/push",
    permission=Permission.CONTROL,
    answer="The snapshot in the registry",
    errors=(403, 404, 409, 422, 503),
    registry_auth=True,
    tool=Tool(
        "snapshots_push",
        "Send a snapshot to a registry",
        "Send a snapshot to a registry, from which other hosts can fetch it. It may take minutes. If the call is "
        "interrupted, call it again to continue the transfer.",
        idempotent=True,
    ),
    client_timeout_s=_TRANSFER_S,
    examples={"A tag": {"reference": "registry.example.com:5000/team/app:1"}},
)
async def push_snapshot(context: Context, snapshot: str, *, body: PushSnapshot) -> RegistrySnapshot:
    """Send a snapshot to a registry, and wait until it is completely there.

    Chunks that the registry already has are not sent, such as those of other snapshots in the same repository. The
    transfer ends if the client disconnects; the next call continues it. The snapshot contains the guest's memory,
    including its secrets.
    """
    client = await _client(context, body.reference, body.registry_secret)
    push = partial(context.deps.transfers.push, context.named(snapshot), body.reference, client)
    with image_problems("reference"):
        return await context.unless_stopping(push)


async def _client(context: Context, reference: str, secret: str | None) -> Client:
    await admit_image(context, reference)
    is_admin = context.caller.may(Permission.ADMIN)
    return Client(context.project, is_admin, await registry_auth(context, secret))


@TABLE.operation(
    "GET /api/v1/transfers", permission=Permission.VIEW, answer="The running transfers", client="snapshots.transfers"
)
async def list_transfers(context: Context) -> list[TransferView]:
    """List the running transfers of snapshots to and from registries."""
    return context.deps.transfers.under_way(context.seen)


@TABLE.operation("GET /api/v1/snapshots/{snapshot}", permission=Permission.VIEW, answer="The snapshot")
async def get_snapshot(context: Context, snapshot: str) -> SnapshotView:
    """Get a snapshot."""
    found = context.deps.store.projection.snapshots.get(context.named(snapshot))
    if found is None:
        raise no_such_snapshot(snapshot)
    return snapshot_view(found)


@TABLE.operation(
    "DELETE /api/v1/snapshots/{snapshot}",
    permission=Permission.CONTROL,
    answer="The snapshot is deleted",
    errors=(409, 503),
    tool=Tool(
        "snapshots_delete",
        "Delete a snapshot",
        "Delete a snapshot permanently. VMs made from it keep running.",
        destructive=True,
        idempotent=True,
    ),
    journaled=True,
)
async def delete_snapshot(context: Context, snapshot: str) -> None:
    """Delete a snapshot; VMs made from it keep running."""
    await context.deps.vms.copies.remove_snapshot(context.named(snapshot))


def _by_age(snapshots: Iterable[Snapshot]) -> list[SnapshotView]:
    shown = (one for one in snapshots if one.is_listed)
    return [snapshot_view(one) for one in sorted(shown, key=lambda one: (one.created_at, one.key))]
