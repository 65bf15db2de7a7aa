"""`volar volumes`."""

from __future__ import annotations

import click

from volant.client import VolumesOperations
from volant.model import VolumeView

from ._derived import Shown, add_commands
from ._lazy_group import Lazy, LazyGroup
from ._shown import Sheet, text_of

_LAZY = {"repair": Lazy("_volumes_repair:repair", "Make a volume readable again after its last writer was killed.")}


@click.group(name="volumes", cls=LazyGroup, lazy=_LAZY, default="list")
def group() -> None:
    """Manage volumes: disks that outlive VMs.

    Without a command, list them. `volar vms create --volume NAME:/path` mounts one in a VM; `:ro` at the end makes it
    read-only. One VM can write to a volume, or any number can read it.
    """


def _used(volume: VolumeView) -> object:
    return "its file is missing" if volume.used_bytes is None else text_of("used_bytes", volume.used_bytes)


_SHOWN = Shown(
    {VolumeView: Sheet(("name", "size_mb", "used_bytes", "writer", "used_by"), cells={"used_bytes": _used})},
    {"resize": "volume {name} has {size_mb}", "clone": "volume {name} is a copy of {volume}"},
)
add_commands(group, "volumes", VolumesOperations, _SHOWN)
