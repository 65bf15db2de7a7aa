"""The mounts of a VM: volumes, and directories of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ._problem import contradictory, invalid
from ._row import VmRow
from ._volume import MAX_VOLUMES, DirectoryMount, VolumeMount, parse_directory, parse_volume


class Mounts(NamedTuple):
    """The mounts of a VM. In each tuple, parents come before mounts inside them."""

    volumes: tuple[VolumeMount, ...] = ()
    directories: tuple[DirectoryMount, ...] = ()


def mounts_of(row: VmRow) -> list[VolumeMount | DirectoryMount]:
    """Returns all mounts of a VM, parents before mounts inside them. A VM with mounts boots cold."""
    return sorted((*row.volumes, *row.directories), key=_depth)


def parse_mounts(texts: Sequence[str]) -> Mounts:
    """Parses the mounts of a VM.

    :raises Problem: 400, one is malformed or there are too many; 422, two have the same name or path.
    """
    if len(texts) > MAX_VOLUMES:
        raise invalid("volumes", f"volumes has {len(texts)} members, and a VM can have at most {MAX_VOLUMES}")
    volumes = [parse_volume(text) for text in texts if not text.startswith("/")]
    directories = [parse_directory(text) for text in texts if text.startswith("/")]
    names = [mount.name for mount in volumes]
    paths = [*(mount.path for mount in volumes), *(mount.path for mount in directories)]
    for what, found in (("volume", names), ("path", paths)):
        for number, each in enumerate(found):
            if each in found[:number]:
                raise contradictory("volumes", f"volumes has the {what} {each!r} twice")
    return Mounts(tuple(sorted(volumes, key=_depth)), tuple(sorted(directories, key=_depth)))


def _depth(mount: VolumeMount | DirectoryMount) -> tuple[int, str]:
    return mount.path.count("/"), mount.path
