"""Directories of the host as devices of a QEMU: each is a virtiofsd at the other end of an inherited connection.

They come last on the command line, so that they change no other device's place. The guest's memory must be a shared
file, as virtiofsd maps it: that of a cold boot is one.
"""

from __future__ import annotations

from collections.abc import Sequence

from volant.hypervisor._interface import SharedDirectory

LEAST_QEMU = (8, 1)
"""Before, QEMU crashes on a virtiofsd that knows the tag of its device."""
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
    """Returns how many of the devices of a command line are directories of the host."""
    return sum(device.startswith("vhost-user-fs-") for device in devices)
