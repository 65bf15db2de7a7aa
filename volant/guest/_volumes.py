"""`PUT /v1/daemon/volumes`: mounts the VM's volumes and directories of the host, and grows volumes.

The directory is created and opened with the VM's root as `/` (`_root.inside`), and the volume is mounted on the opened
directory. So the kernel resolves every link inside that root, and a link can't lead to the agent's own files.

A request can be repeated: a mounted volume stays mounted. The daemon sends it before each workload, to each agent of a
boot, and after a volume has grown. The files that an empty volume hides are first copied to it (`_copy_up`).
"""

# ruff: noqa: PTH103, PTH116, PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import contextlib
import os
import threading
import time

from . import _copy_up, _root, _rootfs
from ._checks import check_directory, check_flag, check_integer, check_object, decode_json
from ._http import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from ._http import Request
    from ._stream import Stream

BUSYBOX = "/usr/bin/busybox"
_FIELDS = {"serial", "tag", "path", "read_only", "nocopy", "bytes"}
_MAX_TEXT = {"serial": 20, "tag": 36}
"""The kernel's limits on the names of devices."""
_MOST = 64
_MAX_BYTES = 2**62
_GROWN_S = 5.0
"""How long the disk may take to reach the size in the request."""
_LOCKED_S = 30.0
_TARGET = 3
"""The descriptor of the directory in the mounting program."""

_UNFINISHED = "what a VM has there was not copied into the volume in whole; start a VM that writes to the volume once"

_lock = threading.Lock()


def serve_put(stream: Stream, request: Request) -> None:
    """Answers the request.

    :raises Problem: 400, malformed; 409, a volume can't be mounted or grown; 503, they are being mounted
    """
    wanted = decode_json(stream.read_body(request), {"volumes"}).get("volumes")
    if not isinstance(wanted, list) or len(wanted) > _MOST:
        raise Problem(400, f"volumes is not a list of at most {_MOST} objects", field="volumes")
    volumes = [_Volume(value, f"volumes[{number}].") for number, value in enumerate(wanted)]
    if not _lock.acquire(timeout=_LOCKED_S):
        raise Problem(503, "the volumes are being mounted", headers=[("Retry-After", "1")])
    try:
        for volume in volumes:
            try:
                why = _mount_directory(volume) if volume.kind == "tag" else _mount(volume)
            except OSError as error:
                why = str(error)
            if why:
                raise Problem(409, f"{volume.path}: {why}", field="volumes")
    finally:
        _lock.release()
    stream.answer(200, b"{}\n")


class _Volume:
    """A checked `agent_types.GuestVolume`."""

    def __init__(self, value: object, prefix: str) -> None:
        """Parses a volume. :raises Problem: 400, a field is wrong."""
        found = check_object(value, _FIELDS, prefix.removesuffix("."), prefix)
        self.kind = "tag" if "tag" in found else "serial"
        device = found.get(self.kind)
        if not isinstance(device, str) or not device or len(device) > _MAX_TEXT[self.kind]:
            raise Problem(400, f"{prefix}{self.kind} names no device", field=f"{prefix}{self.kind}")
        self.device = device
        self.path = check_directory(found.get("path"), f"{prefix}path")
        self.read_only = check_flag(found.get("read_only", False), f"{prefix}read_only")
        self.nocopy = check_flag(found.get("nocopy", False), f"{prefix}nocopy")
        self.bytes = check_integer(found.get("bytes", 0), f"{prefix}bytes", 0, _MAX_BYTES)


def _mount(volume: _Volume) -> str:
    """Mounts one volume unless it is mounted, grows it, and fills it if it is empty. Returns the reason of a failure,
    or an empty text. Raises OSError."""
    device = _rootfs.find_disk(volume.device)
    if device is None:
        return f"there is no disk with the serial number {volume.device}"
    with _directory(volume.path) as there:
        if os.fstat(there).st_dev == os.stat(device).st_rdev:
            if not _copy_up.is_unfinished(_at(there)):
                _grow(volume, device, there)
                return ""
            # Only without it can be seen what it hides.
            _run(["umount", "-l", f"/proc/self/fd/{_TARGET}"], there)
    with _directory(volume.path) as hidden:
        if not _rootfs.holds_ext4(device):
            return "the volume holds no ext4 filesystem: its superblock is not there"
        options = "errors=remount-ro" + (",ro" if volume.read_only else "")
        if _run(["mount", "-t", "ext4", "-o", options, device, f"/proc/self/fd/{_TARGET}"], hidden) != 0:
            return "the volume holds no sound ext4 filesystem" + _rootfs.kernel_error("EXT4-fs")
        with _directory(volume.path) as there:
            if volume.read_only:
                return _UNFINISHED if _copy_up.is_unfinished(_at(there)) else ""
            _grow(volume, device, there)
            try:
                _copy_up.copy_up(None if volume.nocopy else _at(hidden), _at(there))
            except OSError as error:
                return f"what the VM has there can't be copied into the empty volume: {error.strerror}"
    return ""


def _grow(volume: _Volume, device: str, there: int) -> None:
    """Grows a mounted volume to the end of its disk. Raises OSError."""
    if not volume.read_only:
        _wait_for_size(device, volume.bytes)
        _rootfs.grow(device, _at(there))


@contextlib.contextmanager
def _directory(path: str) -> Generator[int]:
    """Creates and opens a directory of the VM's root, or the filesystem mounted there."""

    def make_and_open() -> int:
        os.makedirs(path, exist_ok=True)
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    opened = _root.inside(make_and_open)
    try:
        yield opened
    finally:
        os.close(opened)


def _at(directory: int) -> str:
    """Returns the path of an open directory, not of a filesystem mounted above it."""
    return f"/proc/self/fd/{directory}/."


def _mount_directory(volume: _Volume) -> str:
    """Mounts a directory of the host unless it is mounted. Returns the reason of a failure, or an empty text. Raises
    OSError."""
    with open("/proc/mounts", errors="surrogateescape") as handle:
        if any(line.split(" ")[:3:2] == [volume.device, "virtiofs"] for line in handle):
            return ""
    # Programs of the host run with no other user's rights, and its devices are not this machine's.
    options = "nosuid,nodev" + (",ro" if volume.read_only else "")
    with _directory(volume.path) as there:
        command = ["mount", "-t", "virtiofs", "-o", options, volume.device, f"/proc/self/fd/{_TARGET}"]
        if _run(command, there) != 0:
            return "the directory of the host can't be mounted" + _rootfs.kernel_error("virtiofs")
    return ""


def _run(arguments: list[str], target: int) -> int:
    """Runs BusyBox with a descriptor as `_TARGET`, and returns its exit code."""
    # If it had this number already, it would keep its flag to be closed.
    other = os.dup(target)
    try:
        hand_over = [(os.POSIX_SPAWN_DUP2, other, _TARGET)]
        pid = os.posix_spawn(BUSYBOX, ["busybox", *arguments], os.environ, file_actions=hand_over)
    finally:
        os.close(other)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _wait_for_size(device: str, size: int) -> None:
    """Waits until a disk has at least that many bytes. :raises OSError: it does not."""
    end = time.monotonic() + _GROWN_S
    while True:
        with open(device, "rb") as handle:
            has = handle.seek(0, os.SEEK_END)
        if has >= size:
            return
        if time.monotonic() >= end:
            raise OSError(f"its disk has {has} bytes, and should have {size}")
        time.sleep(0.02)
