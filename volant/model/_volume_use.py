"""The users of a volume: one VM that writes, or any number that read."""

from __future__ import annotations

from collections.abc import Iterable

from ._problem import Problem
from ._row import Status, VmRow
from ._volume import Volume, VolumeMount

VOLUME_REFUSALS = frozenset({"volume-in-use", "volume-changed"})
"""Codes of the problems of a VM that can't open its volumes at its launch."""


def holds_volumes(row: VmRow) -> bool:
    """Returns whether a process of the VM may have its volumes open."""
    return bool(row.tag)


def claims_volumes(row: VmRow) -> bool:
    """Returns whether the VM holds its volumes, or is about to."""
    return bool(row.tag) or row.status in (Status.PENDING, Status.STARTING)


def mount_of(row: VmRow, volume_id: str) -> VolumeMount | None:
    """Returns the VM's mount of a volume; None if it does not mount it."""
    return next((mount for mount in row.volumes if mount.id == volume_id), None)


def users_of(volume_id: str, rows: Iterable[VmRow]) -> list[VmRow]:
    """Returns the VMs that refer to a volume, running or not."""
    return [row for row in rows if mount_of(row, volume_id) is not None]


def writer_of(volume_id: str, rows: Iterable[VmRow]) -> VmRow | None:
    """Returns the VM that may be writing to a volume now."""
    for row in rows:
        mount = mount_of(row, volume_id)
        if mount is not None and not mount.read_only and holds_volumes(row):
            return row
    return None


def check_volumes_free(
    row: VmRow, others: Iterable[VmRow], volumes: Iterable[Volume], *, is_launched: bool = False
) -> None:
    """Checks that a VM can open its volumes.

    :param others: VMs, may include this one
    :param volumes: all volumes
    :param is_launched: whether only VMs with a process count, as this VM is being launched
    :raises Problem: 409, another VM uses one, or one is being copied.
    """
    if not row.volumes:
        return
    counts = holds_volumes if is_launched else claims_volumes
    having = [other for other in others if other.volumes and other.id != row.id and counts(other)]
    for mount in row.volumes:
        for other in having:
            its = mount_of(other, mount.id)
            if its is not None and not (its.read_only and mount.read_only):
                raise _in_use(mount, row, f"VM {other.name!r} {'reads' if its.read_only else 'writes to'} it")
        for copy in volumes:
            if copy.source == mount.id and copy.status == "creating" and not mount.read_only:
                raise _in_use(mount, row, f"it is being copied to {copy.name!r}")


def check_unchanged(row: VmRow, volumes: Iterable[Volume]) -> None:
    """Checks that the volumes of a VM that continues from a checkpoint are unchanged.

    :raises Problem: 409, one was written to since, is being deleted, or does not exist.
    """
    counts = {volume.id: volume.writers for volume in volumes if volume.status != "deleting"}
    for mount in row.volumes:
        if counts.get(mount.id) != mount.writers:
            raise Problem(
                409,
                "volume-changed",
                f"a VM has written to the volume {mount.name!r} since VM {row.name!r} was copied, or it is gone",
                vm=row.name,
                hint="the memory of the copy has older parts of it; take another snapshot",
            )


def _in_use(mount: VolumeMount, row: VmRow, why: str) -> Problem:
    wants = "read" if mount.read_only else "write to"
    return Problem(
        409,
        "volume-in-use",
        f"VM {row.name!r} can't {wants} the volume {mount.name!r}: {why}",
        field="volumes",
        vm=row.name,
        hint="one VM can write to a volume, or any number can read it; stop the other VM first",
    )
