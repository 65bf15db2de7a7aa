"""Creates and checks layers: qcow2 images over a read-only base, or with an empty ext4 file system."""

from __future__ import annotations

from pathlib import Path

import trio

from volant.host import PROGRAM_ENVIRONMENT, Host
from volant.hypervisor._interface import Disk, LaunchFailed

_IMG = "qemu-img"
_MKFS = "mke2fs"
_EMPTY = ("-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", "-m", "1")
"""Options of the file system. Tables stay unwritten, as the file reads as zeros. 1 % is reserved for root, so that a
full system can shut down."""
_IMG_S = 60.0
_IMG_MISSING = "qemu-img is not installed (Debian: apt install qemu-utils)"
_MKFS_MISSING = "mke2fs is not installed (Debian: apt install e2fsprogs)"
_MAGIC = b"QFI\xfb"
_HEADER_BYTES = 80
_EXTERNAL_DATA = 1 << 2
"""The incompatible feature "external data file" of a qcow2 header."""


async def make_layer(host: Host, disk: Disk, like: Path | None) -> None:
    """Implements `Hypervisor.make_layer`."""
    new = disk.layer.with_name(f"{disk.layer.name}.new")
    try:
        await host.files.remove(new)
        if like is None:
            await _create(host, disk, new)
        else:
            await host.files.copy(like, new)
        await host.files.put_in_place(new, disk.layer)
    except OSError as error:
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        if missing in (_IMG, _MKFS):
            raise LaunchFailed("qemu_missing", _IMG_MISSING if missing == _IMG else _MKFS_MISSING) from None
        raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be created: {error}") from error


async def _create(host: Host, disk: Disk, path: Path) -> None:
    if disk.base is None:
        await _create_empty(host, disk, path)
        return
    command = [_IMG, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(disk.base), str(path)]
    if disk.size_mb is not None:
        command.append(f"{disk.size_mb}M")
    await _run(host, disk, command)


async def _create_empty(host: Host, disk: Disk, path: Path) -> None:
    """Creates the file system in a sparse file first, as qemu-img leaves out unwritten ranges."""
    raw = path.with_name(f"{path.name}.raw")
    try:
        await host.files.remove(raw)
        await _run(host, disk, [_MKFS, *_EMPTY, str(raw), f"{disk.size_mb}M"])
        await _run(host, disk, [_IMG, "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)])
    finally:
        await host.files.remove(raw)


async def _run(host: Host, disk: Disk, command: list[str]) -> None:
    name, directory = command[0], disk.layer.parent
    try:
        status, output = await host.processes.run(command, env=PROGRAM_ENVIRONMENT, cwd=directory, timeout_s=_IMG_S)
    except trio.TooSlowError:
        raise LaunchFailed("bad_disk", f"{name} did not create {disk.layer} within {_IMG_S:g} s") from None
    if status != 0:
        text = output.decode("utf-8", "replace").strip()[-500:]
        raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be created: {name}: {text}")


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
