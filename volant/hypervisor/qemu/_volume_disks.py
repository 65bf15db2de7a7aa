"""Volumes as disks of QEMU: its command line, and changes at run time.

They come last on the command line, so that they change no other device's place. QEMU locks the files: a second QEMU
can't open a volume that another one writes to, whoever started it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from volant.hypervisor._interface import DiskLimits, MachineSpec, SharedDirectory, VolumeDisk

# Directories of the host as devices of a QEMU: each is a virtiofsd at the other end of an inherited connection.
#
# They come last on the command line, so that they change no other device's place. The guest's memory must be a shared
# file, as virtiofsd maps it: that of a cold boot is one.


LEAST_QEMU = (8, 1)
"""The minimum version. Earlier versions crash on a virtiofsd that reports the tag of its device."""
_ID = "directory"


def directory_argv(directories: Sequence[SharedDirectory], connections: Sequence[int], device: str) -> list[str]:
    """Returns the options for directories.

    :param connections: the inherited descriptors, one for each
    :param device: the name of the device on the machine's bus
    """
    argv: list[str] = []
    for number, (directory, connection) in enumerate(zip(directories, connections, strict=True)):
        name = f"{_ID}{number}"
        argv += [
            *("-chardev", f"socket,id={name},fd={connection}"),
            *("-device", f"{device},id=fs-{name},chardev={name},tag={directory.tag}"),
        ]
    return argv


def count_directories(devices: Sequence[str]) -> int:
    """Returns the number of devices on a command line that are directories of the host."""
    return sum(device.startswith("vhost-user-fs-") for device in devices)


_GROUP = "vm"
"""The throttle group of all disks of a machine: they share one limit."""
_ROOT = "root0"


def volume_argv(volumes: Sequence[VolumeDisk], device: str) -> list[str]:
    """Returns the options for volumes. `device` is the name of a virtio disk on the machine's bus.

    As for the root disk, a full file system of the host is an I/O error in the guest.
    """
    argv: list[str] = []
    for number, volume in enumerate(volumes):
        name, access = _node(number), "read-only=on" if volume.read_only else "discard=unmap"
        path = str(volume.path).replace(",", ",,")
        argv += [
            *("-blockdev", f"file,node-name={name}-file,filename={path},{access}"),
            *("-blockdev", f"raw,node-name={name},file={name}-file,{access}"),
            "-device",
            f"{device},id=disk-{name},drive={name},serial={volume.serial},werror=report,rerror=report",
        ]
    return argv


def parse_volumes(nodes: Mapping[str, Mapping[str, str]], devices: Sequence[Mapping[str, str]]) -> list[VolumeDisk]:
    """Returns the volumes of a command line, by its block nodes and its devices. :raises KeyError: it is malformed."""
    found = []
    for device in devices:
        if device.get("id", "").startswith("disk-volume"):
            file = nodes[f"{device['drive']}-file"]
            path, read_only = Path(file["filename"]), file.get("read-only") == "on"
            found.append(VolumeDisk(path, device["serial"], read_only))
    return found


def resize_arguments(spec: MachineSpec, serial: str, size_bytes: int) -> dict[str, object]:
    """Returns the arguments of `block_resize`. :raises LookupError: the machine has no such volume."""
    for number, volume in enumerate(spec.volumes):
        if volume.serial == serial:
            return {"node-name": _node(number), "size": size_bytes}
    raise LookupError(serial)


def throttle_arguments(spec: MachineSpec, limits: DiskLimits) -> list[dict[str, object]]:
    """Returns the arguments of `block_set_io_throttle`, once for each disk that may be written to or is a volume."""
    disks = [_ROOT] if spec.root is not None else []
    disks += [f"disk-{_node(number)}" for number in range(len(spec.volumes))]
    if spec.accelerator != "kvm":
        # A PCI device is a proxy of the disk, which has no id of its own.
        disks = [f"/machine/peripheral/{disk}/virtio-backend" for disk in disks]
    bounds = {"bps": limits.bytes_per_s or 0, "iops": limits.iops or 0}
    unused = dict.fromkeys(("bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
    return [{"id": disk, "group": _GROUP, **bounds, **unused} for disk in disks]


def disk_error(spec: MachineSpec, event: Mapping[str, object]) -> str:
    """Returns a text for people about a `BLOCK_IO_ERROR`."""
    node = str(event.get("node-name", ""))
    disk = "its disk"
    for number, volume in enumerate(spec.volumes):
        if node.removesuffix("-file") == _node(number):
            disk = f"its volume {volume.path.name}"
    what = "write to" if event.get("operation") == "write" else "read"
    return f"the host can't {what} {disk}: {event.get('reason') or 'input/output error'}"


def _node(number: int) -> str:
    return f"volume{number}"
