"""Creates and checks layers: qcow2 images over a read-only base image."""

from __future__ import annotations

from pathlib import Path

import trio

from volant.host import PROGRAM_ENVIRONMENT, Host
from volant.hypervisor._interface import Disk, LaunchFailed

_IMG = "qemu-img"
_IMG_S = 60.0
_IMG_MISSING = "qemu-img is not installed (Debian: apt install qemu-utils)"
_MAGIC = b"QFI\xfb"
_HEADER_BYTES = 80
_EXTERNAL_DATA = 1 << 2
"""The incompatible feature "external data file" of a qcow2 header."""


async def make_layer(host: Host, disk: Disk, like: Path | None) -> None:
    """See `Hypervisor.make_layer`."""
    new = disk.layer.with_name(f"{disk.layer.name}.new")
    try:
        await host.files.remove(new)
        if like is None:
            await _create(host, disk, new)
        else:
            await host.files.copy(like, new)
        await host.files.put_in_place(new, disk.layer)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename == _IMG:
            raise LaunchFailed("qemu_missing", _IMG_MISSING) from None
        raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be created: {error}") from error


async def _create(host: Host, disk: Disk, path: Path) -> None:
    command = [_IMG, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(disk.base), str(path)]
    if disk.size_mb is not None:
        command.append(f"{disk.size_mb}M")
    try:
        status, output = await host.processes.run(command, env=PROGRAM_ENVIRONMENT, cwd=path.parent, timeout_s=_IMG_S)
    except trio.TooSlowError:
        raise LaunchFailed("bad_disk", f"qemu-img did not create {disk.layer} within {_IMG_S:g} s") from None
    if status != 0:
        text = output.decode("utf-8", "replace").strip()[-500:]
        raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be created: {text}")


async def check_layer(host: Host, layer: Path) -> None:
    """Checks that a layer contains its data itself.

    A guest that controls QEMU could write another file of the host into the header, for QEMU to open at the next start.

    :raises LaunchFailed: `bad_disk`.
    """
    header = await host.files.read(layer, _HEADER_BYTES)
    if header[:4] != _MAGIC or len(header) < _HEADER_BYTES:
        raise LaunchFailed("bad_disk", f"{layer} is damaged: it is not a qcow2 image")
    version, features = int.from_bytes(header[4:8], "big"), int.from_bytes(header[72:80], "big")
    if version < 3 or features & _EXTERNAL_DATA:
        raise LaunchFailed("bad_disk", f"{layer} was not created by this daemon")
