"""PID 1's part of a root filesystem: find the disk, mount it, give it what programs expect to find.

It is an ext4 filesystem on the whole disk that has the serial number which the kernel's command line names. Mounted in
it are the guest's own `/proc`, `/sys` and `/dev`, and a fresh `/run` and `/tmp` in memory, as they hold what belongs to
one boot. What it has no directory for is made, where that can be.
"""

# ruff: noqa: PTH103, PTH104, PTH108, PTH110, PTH114, PTH123, PTH208 - pathlib would cost every boot more than this module does

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = "/mnt"
"""Where the root filesystem is mounted, if there is one."""
STATE_FILE = "/run/volant/root"
"""What became of that: `mounted`, or `failed: ` and why."""
_DISK_S = 5.0
_SUPERBLOCK_AT = 1024
_MAGIC_AT, _MAGIC = _SUPERBLOCK_AT + 56, b"\x53\xef"
_BLOCKS_AT, _BLOCK_SIZE_AT, _BLOCKS_HIGH_AT = 0x04, 0x18, 0x150
_RESIZE = 0x40086610
"""`EXT4_IOC_RESIZE_FS`, of a filesystem that is mounted, to so many blocks."""
_WORTH = 1024 * 1024
_MAX_KERNEL_LOG = 4096
"""Records of the kernel's log that are read for the reason of a failure."""
_BINDS = ("proc", "sys", "dev")
_IN_MEMORY = (("run", "0755"), ("tmp", "1777"))


def mount_root(serial: str, run: Callable[[list[str]], int], say: Callable[[str], None]) -> None:
    """Mount it, and leave in `STATE_FILE` what came of that.

    `run` runs BusyBox to its end and returns the exit code; `say` says something on the console.
    """
    try:
        why = _mount(serial, run, say)
    except OSError as error:
        why = str(error)
    if why:
        say(f"the root filesystem can't be mounted: {why}")
    with open(STATE_FILE + ".new", "w") as handle:
        handle.write(f"failed: {why[:1000]}\n" if why else "mounted\n")
    os.rename(STATE_FILE + ".new", STATE_FILE)


def replace(path: str, data: bytes, mode: int = 0o444) -> None:
    """Make a file with `data` in place of what is there, whole or not at all. :raises OSError"""
    new = path + ".new"
    try:
        os.unlink(new)
    except FileNotFoundError:
        pass
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
    os.rename(new, path)


def overwrite(path: str, data: bytes) -> bool:
    """Write `data` over a file that is as long as that and has one name; whether there is one. What fits a block is
    written whole or not at all.

    On ext4 a new file, a new name and the blocks of both cost a clone 60 ms under TCG, and this some 10 ms.
    """
    try:
        # Whatever else has that name must neither be followed nor waited for.
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        fits = found.st_mode & 0o170000 == 0o100000 and (found.st_size, found.st_nlink) == (len(data), 1)
        return fits and os.pwrite(fd, data, 0) == len(data)
    except OSError:
        return False
    finally:
        os.close(fd)


def _mount(serial: str, run: Callable[[list[str]], int], say: Callable[[str], None]) -> str:
    """Return why it can't be, or nothing."""
    device = _find(serial)
    if device is None:
        return f"there is no disk with the serial number {serial}"
    with open(device, "rb") as handle:
        handle.seek(_MAGIC_AT)
        if handle.read(2) != _MAGIC:
            return "the image holds no ext4 filesystem: its superblock is not there"
    if run(["mount", "-t", "ext4", "-o", "errors=remount-ro", device, ROOT]) != 0:
        return "the image holds no sound ext4 filesystem" + _kernels_words()
    try:
        _grow(device)
    except OSError as error:
        say(f"the root filesystem can't grow to the size of its disk: {error}")
    for name in _BINDS:
        _inside(["mount", "-o", "rbind", f"/{name}", f"{ROOT}/{name}"], name, run, say)
    for name, mode in _IN_MEMORY:
        options = f"nosuid,nodev,mode={mode}"
        _inside(["mount", "-t", "tmpfs", "-o", options, "tmpfs", f"{ROOT}/{name}"], name, run, say)
    return ""


def _grow(device: str) -> None:
    """Let the filesystem be as large as its disk, which may be larger than the image. :raises OSError:"""
    with open(device, "rb") as handle:
        disk = handle.seek(0, os.SEEK_END)
        handle.seek(_SUPERBLOCK_AT)
        superblock = handle.read(1024)
    blocks, block = (int.from_bytes(superblock[at : at + 4], "little") for at in (_BLOCKS_AT, _BLOCK_SIZE_AT))
    blocks |= int.from_bytes(superblock[_BLOCKS_HIGH_AT : _BLOCKS_HIGH_AT + 4], "little") << 32
    size = 1024 << block
    # A group that has not room for its own tables is left out, so a small rest is no reason to ask.
    if disk // size - blocks < _WORTH // size:
        return
    import fcntl

    fd = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _RESIZE, (disk // size).to_bytes(8, "little"))
    finally:
        os.close(fd)


def _inside(command: list[str], name: str, run: Callable[[list[str]], int], say: Callable[[str], None]) -> None:
    """Mount something in the root filesystem, at `name`, which must not be a link out of it."""
    path = f"{ROOT}/{name}"
    try:
        if os.path.islink(path):
            say(f"/{name} of the root filesystem is a link and is left as it is")
            return
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        say(f"the root filesystem has no /{name}: {error}")
        return
    if run(command) != 0:
        say(f"/{name} can't be mounted in the root filesystem")


def _find(serial: str) -> str | None:
    """Return the block device with a serial number; wait a moment for it, as drivers may be slow."""
    end = time.monotonic() + _DISK_S
    while True:
        for name in sorted(os.listdir("/sys/block")):
            try:
                with open(f"/sys/block/{name}/serial") as handle:
                    found = handle.read(64).strip()
            except OSError:
                continue
            if found == serial and os.path.exists(f"/dev/{name}"):
                return f"/dev/{name}"
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


def _kernels_words() -> str:
    """Return the last thing that the kernel has said about ext4."""
    words = ""
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            for _ in range(_MAX_KERNEL_LOG):
                _, _, text = os.read(log, 8192).decode(errors="replace").partition(";")
                if text.startswith("EXT4-fs"):
                    words = ": " + text.splitlines()[0][:300]
        finally:
            os.close(log)
    except OSError:
        pass
    return words
