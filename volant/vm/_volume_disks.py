"""From a VM's row to the disks of its volumes and the devices of its directories, and to what its guest mounts."""

from __future__ import annotations

from volant.directories import directory_socket, directory_tag
from volant.host import Host
from volant.hypervisor import DiskLimits, SharedDirectory, VolumeDisk
from volant.model import VmRow, VolumeMount, mounts_of
from volant.volumes import needs_replay, volume_path

from ._errors import StepError
from ._settings import VmSettings

_SERIAL = "vol-"


def serial_of(volume_id: str) -> str:
    """Returns the serial number of a volume's disk."""
    return f"{_SERIAL}{volume_id}"


def volume_id_of(serial: str) -> str:
    """Returns the id of the volume whose disk has this serial number."""
    return serial.removeprefix(_SERIAL)


def volume_disks(settings: VmSettings, row: VmRow) -> tuple[VolumeDisk, ...]:
    """Returns the disks of a VM's volumes."""
    return tuple(
        VolumeDisk(volume_path(settings.volume_dir, mount.id), serial_of(mount.id), mount.read_only)
        for mount in row.volumes
    )


def shared_directories(settings: VmSettings, row: VmRow) -> tuple[SharedDirectory, ...]:
    """Returns the devices of a VM's directories of the host."""
    return tuple(
        SharedDirectory(directory_tag(number), directory_socket(settings.runtime_dir, row.id, number))
        for number in range(len(row.directories))
    )


def disk_limits(row: VmRow) -> DiskLimits | None:
    """Returns what a VM's disks may do; None: there is no limit."""
    if row.disk_iops is None and row.disk_mbps is None:
        return None
    return DiskLimits(row.disk_iops, None if row.disk_mbps is None else row.disk_mbps * 2**20)


def guest_volumes(row: VmRow) -> list[dict[str, object]]:
    """Returns the volumes and directories that a guest mounts, in that order, for its agent."""
    found: list[dict[str, object]] = []
    for mount in mounts_of(row):
        entry: dict[str, object] = {"path": mount.path, "read_only": mount.read_only}
        if isinstance(mount, VolumeMount):
            entry["serial"] = serial_of(mount.id)
            if mount.nocopy:
                # Agents that copy nothing don't know the member.
                entry["nocopy"] = True
        else:
            entry["tag"] = directory_tag(row.directories.index(mount))
        found.append(entry)
    return found


async def check_volumes(host: Host, settings: VmSettings, row: VmRow) -> None:
    """:raises StepError: `volume_missing`; `volume_not_clean`; `volume_failed`, the disk fails."""
    for mount in row.volumes:
        path = volume_path(settings.volume_dir, mount.id)
        try:
            if mount.read_only and await needs_replay(host, path):
                raise StepError(
                    "volume_not_clean",
                    f"the volume {mount.name} was not unmounted by the last VM that wrote to it, and a reader "
                    f"can't replay its journal; run 'volar volumes repair {mount.name}', or start a VM that writes",
                )
            exists = host.files.exists(path)
        except FileNotFoundError:
            exists = False
        except OSError as error:
            raise StepError("volume_failed", f"the volume {mount.name} can't be read: {error}") from error
        if not exists:
            raise StepError(
                "volume_missing", f"the volume {mount.name} has no file {path}; put it back, or create the VM anew"
            )
