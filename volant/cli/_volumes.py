"""`volar volumes`."""

from __future__ import annotations

import click

from volant.client import VolumesOperations
from volant.model import CloneVolume, CreateVolume, VolumeView

from ._complete import volume_names
from ._derived import add_commands
from ._lazy_group import Lazy, LazyGroup
from ._options import Size, listing
from ._output import Output
from ._run import Session, command
from ._text import safe

_LAZY = {"repair": Lazy("_volumes_repair:repair", "Make a volume readable again after its last writer was killed.")}


@click.group(name="volumes", cls=LazyGroup, lazy=_LAZY, default="list")
def group() -> None:
    """Manage volumes: disks that outlive VMs.

    Without a command, list them. `volar vms create --volume NAME:/path` mounts one in a VM; `:ro` at the end makes it
    read-only. One VM can write to a volume, or any number can read it.
    """


volume_argument = click.argument("volume", shell_complete=volume_names)
size_option = click.option("--size", "size_mb", type=Size(16), required=True, help="The size, such as 500M or 10G.")


@command(group, "list")
@listing
async def list_(session: Session) -> None:
    """List volumes."""
    volumes = await session.client.volumes.list()
    rows = ((each.name, _mib(each.size_mb), _used(each), each.writer or "", len(each.used_by)) for each in volumes)
    session.out.listing(volumes, ("NAME", "SIZE", "USED", "WRITER", "VMS"), rows)


@command(group, "create")
@click.argument("volume")
@size_option
async def create(session: Session, volume: str, size_mb: int) -> None:
    """Create a volume, formatted and empty."""
    made = await session.client.volumes.create(CreateVolume(name=volume, size_mb=size_mb))
    session.out.result(made, f"volume {safe(made.name)} is created")


@command(group, "get")
@volume_argument
async def get(session: Session, volume: str) -> None:
    """Show a volume, and the VMs that mount it."""
    _show(session.out, await session.client.volumes.get(volume))


@command(group, "resize")
@volume_argument
@size_option
async def resize(session: Session, volume: str, size_mb: int) -> None:
    """Grow a volume, even while a VM writes to it."""
    grown = await session.client.volumes.resize(volume, size_mb)
    session.out.result(grown, f"volume {safe(grown.name)} has {_mib(grown.size_mb)}")


@command(group, "clone")
@volume_argument
@click.argument("copy")
async def clone(session: Session, volume: str, copy: str) -> None:
    """Copy a volume that no VM writes to."""
    made = await session.client.volumes.clone(volume, CloneVolume(name=copy))
    session.out.result(made, f"volume {safe(made.name)} is a copy of {safe(volume)}")


def _show(out: Output, volume: VolumeView) -> None:
    if out.json:
        out.document(volume)
        return
    out.fields(
        [
            ("name", volume.name),
            ("status", volume.status),
            ("size", _mib(volume.size_mb)),
            ("used", _used(volume)),
            ("writer", volume.writer or "none"),
            ("VMs", ", ".join(volume.used_by) or "none"),
            ("created", f"{volume.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ]
    )


def _mib(size_mb: int) -> str:
    return f"{size_mb / 1024:g} GiB" if size_mb % 1024 == 0 else f"{size_mb} MiB"


def _used(volume: VolumeView) -> str:
    return "its file is missing" if volume.used_bytes is None else f"{volume.used_bytes / 2**20:.0f} MiB"


add_commands(group, "volumes", VolumesOperations)
