"""Snapshots: copies of VMs that are kept."""

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
        "Keep a VM as it is now",
        "Keep a copy of a running or paused VM, memory and disk, on the host, to go back to it with vms_restore, also "
        "after the VM is deleted. Take one before something that may break the VM.",
    ),
    client="snapshots.take",
    client_timeout_s=600,
    journaled=True,
    examples={"A name": {"name": "prepared", "description": "All packages are installed"}},
)
async def take_snapshot(context: Context, name: str, *, body: TakeSnapshot) -> SnapshotTaken:
    """Keep a VM as it is now: memory, devices and disk.

    The guest is paused for a moment, and what is copied then is written to the disk while it runs again. A client that
    leaves cancels nothing. The VM has to be running or paused; a command that ends that ends this too.
    """
    check_take(body)
    take = partial(context.deps.vms.copies.take_snapshot, context.named(name), body, key=context.key)
    return SnapshotTaken.of(await take())


@TABLE.operation(
    "GET /api/v1/vms/{name}/snapshots",
    permission=Permission.VIEW,
    answer="The oldest first",
    client="snapshots.list_of_vm",
)
async def list_vm_snapshots(context: Context, name: str) -> list[SnapshotView]:
    """List the snapshots of a VM."""
    vm_id = find_vm(context.deps, context.named(name)).id
    return _by_age(one for one in context.deps.store.projection.snapshots.values() if one.vm.id == vm_id)


@TABLE.operation(
    "GET /api/v1/snapshots",
    permission=Permission.VIEW,
    answer="The oldest first",
    spans=Spans(SnapshotView, lambda one: (one.created_at, one.project, one.name)),
)
async def list_snapshots(context: Context) -> list[SnapshotView]:
    """List all snapshots, also those of deleted VMs, but for replicas: these belong to their VMs."""
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
        "Fetch a snapshot from a registry to this host, to make VMs from it with vms_restore. It may take minutes: if "
        "the call is cut off, call it again, and it goes on where it was.",
    ),
    client_timeout_s=_TRANSFER_S,
    examples={"A tag": {"reference": "registry.example.com:5000/team/app:1"}},
)
async def pull_snapshot(context: Context, *, body: PullSnapshot) -> SnapshotTaken:
    """Fetch a snapshot from a registry, and wait until it is on the disk.

    What this host has already is not fetched: chunks of its template and of other snapshots of the project, and what an
    earlier call has received. A client that leaves ends the transfer. The files that the snapshot relies on are matched
    by digest; an OCI image that this host lacks is fetched, and what can't be had is named in the error.
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
    answer="All of it is in the registry",
    errors=(403, 404, 409, 422, 503),
    registry_auth=True,
    tool=Tool(
        "snapshots_push",
        "Send a snapshot to a registry",
        "Send a snapshot to a registry, from which other hosts can fetch it. It may take minutes: if the call is cut "
        "off, call it again, and it goes on where it was.",
        idempotent=True,
    ),
    client_timeout_s=_TRANSFER_S,
    examples={"A tag": {"reference": "registry.example.com:5000/team/app:1"}},
)
async def push_snapshot(context: Context, snapshot: str, *, body: PushSnapshot) -> RegistrySnapshot:
    """Send a snapshot to a registry, and wait until all of it is there.

    What the registry has already is not sent, such as chunks of other snapshots in the same repository. A client that
    leaves ends the transfer; the next one goes on. The snapshot contains the guest's memory, with what is secret in it.
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
    "GET /api/v1/transfers", permission=Permission.VIEW, answer="Those under way", client="snapshots.transfers"
)
async def list_transfers(context: Context) -> list[TransferView]:
    """List the snapshots that are on their way to or from a registry."""
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
    answer="Nothing of it is left",
    errors=(409, 503),
    tool=Tool(
        "snapshots_delete",
        "Delete a snapshot",
        "Destroy a snapshot, for good. VMs that were made from it keep running.",
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
