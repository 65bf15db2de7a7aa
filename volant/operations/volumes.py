"""Volumes: named disks that outlive VMs."""

from __future__ import annotations

from volant.journal import VolumeChanged, VolumeCreated
from volant.model import CloneVolume, CreateVolume, Permission, ResizeVolume, VolumeView

from ._context import Context
from ._spans import Spans
from ._table import TABLE, Tool

_VOLUME = "/api/v1/volumes/{name}"
_COPY_S = 3700


@TABLE.operation(
    "GET /api/v1/volumes",
    permission=Permission.VIEW,
    answer="The volumes, by name",
    spans=Spans(VolumeView, lambda one: (one.project, one.name)),
)
async def list_volumes(context: Context) -> list[VolumeView]:
    """List volumes, which VMs mount."""
    return await context.deps.vms.volumes.views(context.listed)


@TABLE.operation(
    "POST /api/v1/volumes",
    permission=Permission.CONTROL,
    status=201,
    answer="The volume, formatted and empty",
    errors=(404, 503),
    idempotent=True,
    tool=Tool(
        "volumes_create",
        "Make a volume",
        "Make an empty disk that outlives VMs; pass `NAME:/path` in `volumes` to vms_create to mount it. One VM can "
        "write to it, or any number of VMs can read it (`NAME:/path:ro`).",
    ),
    client_timeout_s=150,
    journaled=True,
    examples={"1 GiB": {"name": "data", "size_mb": 1024}},
)
async def create_volume(context: Context, *, body: CreateVolume) -> VolumeCreated:
    """Create a volume: an ext4 filesystem in a file of the host, which takes up only the space that was written.

    VMs created with `name:/path` in `volumes` mount it there. It is kept when they are deleted.
    """
    return VolumeCreated.of(await context.deps.vms.volumes.create(body, context.project, key=context.key))


@TABLE.operation(f"GET {_VOLUME}", permission=Permission.VIEW, answer="The volume")
async def get_volume(context: Context, name: str) -> VolumeView:
    """Get a volume, with the VMs that mount it."""
    return await context.deps.vms.volumes.view(context.named(name))


@TABLE.operation(
    f"DELETE {_VOLUME}",
    permission=Permission.CONTROL,
    answer="The volume and its content are deleted",
    errors=(409, 503),
    tool=Tool(
        "volumes_delete",
        "Delete a volume",
        "Delete a volume that no VM refers to, with its content, permanently.",
        destructive=True,
        idempotent=True,
    ),
    journaled=True,
)
async def delete_volume(context: Context, name: str) -> None:
    """Delete a volume that no VM refers to, running or not."""
    await context.deps.vms.volumes.delete(context.named(name))


@TABLE.operation(
    f"POST {_VOLUME}/resize",
    permission=Permission.CONTROL,
    answer="The volume, with the new size",
    errors=(409, 503),
    idempotent=True,
    journaled=True,
    examples={"2 GiB": {"size_mb": 2048}},
)
async def resize_volume(context: Context, name: str, *, body: ResizeVolume) -> VolumeChanged:
    """Grow a volume, and the filesystem in a VM that writes to it. A volume can't shrink."""
    return VolumeChanged.of(await context.deps.vms.volumes.resize(context.named(name), body, key=context.key))


@TABLE.operation(
    f"POST {_VOLUME}/clone",
    permission=Permission.CONTROL,
    status=201,
    answer="The copy",
    errors=(503,),
    idempotent=True,
    client_timeout_s=_COPY_S,
    journaled=True,
    examples={"A copy": {"name": "data-2"}},
)
async def clone_volume(context: Context, name: str, *, body: CloneVolume) -> VolumeCreated:
    """Copy a volume that no VM writes to.

    If the host's file system supports it, the copy takes up no space until either volume is written to.
    """
    return VolumeCreated.of(await context.deps.vms.volumes.clone(context.named(name), body, key=context.key))
