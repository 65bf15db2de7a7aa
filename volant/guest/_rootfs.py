"""Mounts the root filesystem, for PID 1.

It is an ext4 filesystem on a whole disk; the kernel's command line has the disk's serial number. If it also has that of
an OCI image's disk, the image is mounted read-only, and the root filesystem is an overlay: the guest's changes go into
a directory of the ext4 filesystem. The guest's own `/proc`, `/sys` and `/dev` are bound into it, and a fresh `/run` and
`/tmp` in memory mounted, as their content belongs to one boot. Missing directories for these are created if possible.
"""

# ruff: noqa: PTH103, PTH104, PTH108, PTH110, PTH114, PTH123, PTH208 - pathlib would cost every boot more than this module does

from __future__ import annotations

import os
import time

from ._system import read_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = "/mnt"
"""The mount point of the root filesystem, if there is one."""
DISK = "/run/volant/disk"
_IMAGE = "/run/volant/image"
"""The directory with the two parts of an overlay. The agent's directory hides them."""
STATE_FILE = "/run/volant/root"
"""The file with the outcome: `mounted`, or `failed: ` and the reason."""
_DISK_S = 20.0
"""Maximum wait for the driver of a disk. Without KVM and next to busy guests, seconds pass while the guest makes little
progress."""
_SUPERBLOCK_AT = 1024
_MAGIC_AT, _MAGIC = _SUPERBLOCK_AT + 56, b"\x53\xef"
_BLOCKS_AT, _BLOCK_SIZE_AT, _BLOCKS_HIGH_AT = 0x04, 0x18, 0x150
_RESIZE = 0x40086610
"""`EXT4_IOC_RESIZE_FS`: resizes a mounted filesystem to a number of blocks."""
_MIN_GROWTH = 1024 * 1024
"""Minimum growth in bytes; a block group without room for its own tables is left out, so a small rest is useless."""
_MAX_KERNEL_LOG = 4096
"""Maximum records of the kernel's log to search for the reason of a failure."""
_BINDS = ("proc", "sys", "dev")
_IN_MEMORY = (("run", "0755"), ("tmp", "1777"))


def mount_root(serial: str, image: str, run: Callable[[list[str]], int], say: Callable[[str], None]) -> None:
    """Mounts the root filesystem, and writes the outcome to `STATE_FILE`.

    :param serial: the serial number of the disk that the guest writes to
    :param image: the serial number of the disk with an OCI image, or an empty text
    :param run: runs BusyBox and returns its exit code
    :param say: writes to the console
    """
    try:
        why = _mount_overlay(serial, image, run, say) if image else _mount(serial, ROOT, run, say)
        if not why:
            _mount_inside(run, say)
    except OSError as error:
        why = str(error)
    if why:
        say(f"the root filesystem can't be mounted: {why}")
    with open(STATE_FILE + ".new", "w") as handle:
        handle.write(f"failed: {why[:1000]}\n" if why else "mounted\n")
    os.rename(STATE_FILE + ".new", STATE_FILE)


def replace(path: str, data: bytes, mode: int = 0o444) -> None:
    """Replaces `path` by a file with `data`, atomically. :raises OSError: the system refuses."""
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
    """Overwrites a regular file of the same length and with one name by `data`; returns False if there is none. Data
    within one block is written atomically.

    Cheaper than `replace`: on ext4 under TCG it takes a clone 10 ms instead of 60 ms.
    """
    try:
        # A link must not be followed, and a FIFO must not block.
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


def _mount_overlay(serial: str, image: str, run: Callable[[list[str]], int], say: Callable[[str], None]) -> str:
    """Mounts the root filesystem as an overlay; returns why it failed, or an empty text."""
    device = find_disk(image)
    if device is None:
        return f"there is no disk with the serial number {image}"
    for directory in (DISK, _IMAGE):
        os.makedirs(directory, exist_ok=True)
    if run(["mount", "-t", "erofs", "-o", "ro", device, _IMAGE]) != 0:
        return "the layers of the OCI image can't be mounted" + kernel_error("erofs")
    why = _mount(serial, DISK, run, say)
    if why:
        return why
    changes, work = f"{DISK}/changes", f"{DISK}/work"
    # mkfs.erofs 1.8 gives the joined root directory mode 0777, and the overlay takes the mode from here.
    for directory in (changes, work):
        os.makedirs(directory, 0o755, exist_ok=True)
    options = f"lowerdir={_IMAGE},upperdir={changes},workdir={work}"
    if run(["mount", "-t", "overlay", "-o", options, "overlay", ROOT]) != 0:
        return "the VM's disk can't be put above the OCI image" + kernel_error("overlayfs")
    _write_hosts(say)
    return ""


def _write_hosts(say: Callable[[str], None]) -> None:
    """Writes `/etc/hosts` if the image has none: container runtimes create it, so images leave it out."""
    directory = f"{ROOT}/etc"
    if os.path.islink(directory) or os.path.lexists(f"{directory}/hosts"):
        return
    try:
        os.makedirs(directory, 0o755, exist_ok=True)
        with open(f"{directory}/hosts", "w") as handle:
            handle.write("127.0.0.1 localhost\n::1 localhost\n")
    except OSError as error:
        say(f"/etc/hosts can't be written: {error}")


def _mount(serial: str, where: str, run: Callable[[list[str]], int], say: Callable[[str], None]) -> str:
    """Mounts the disk that the guest writes to; returns why it failed, or an empty text."""
    device = find_disk(serial)
    if device is None:
        return f"there is no disk with the serial number {serial}"
    if not holds_ext4(device):
        return "the image holds no ext4 filesystem: its superblock is not there"
    # Tables of inodes that were never written are left so: writing them would keep an idle guest busy.
    if run(["mount", "-t", "ext4", "-o", "errors=remount-ro,noinit_itable", device, where]) != 0:
        return "the image holds no sound ext4 filesystem" + kernel_error("EXT4-fs")
    try:
        grow(device, where)
    except OSError as error:
        say(f"the root filesystem can't grow to the size of its disk: {error}")
    return ""


def _mount_inside(run: Callable[[list[str]], int], say: Callable[[str], None]) -> None:
    """Mounts the filesystems that belong to the guest, or to one boot, in the root filesystem."""
    for name in _BINDS:
        _inside(["mount", "-o", "rbind", f"/{name}", f"{ROOT}/{name}"], name, run, say)
    for name, mode in _IN_MEMORY:
        options = f"nosuid,nodev,mode={mode}"
        _inside(["mount", "-t", "tmpfs", "-o", options, "tmpfs", f"{ROOT}/{name}"], name, run, say)


def holds_ext4(device: str) -> bool:
    """Returns whether a disk begins like an ext4 filesystem. :raises OSError: it can't be read."""
    with open(device, "rb") as handle:
        handle.seek(_MAGIC_AT)
        return handle.read(2) == _MAGIC


def grow(device: str, mounted: str = ROOT) -> None:
    """Grows a mounted filesystem to the size of its disk, which may be larger than the image.

    :raises OSError: the system refuses
    """
    with open(device, "rb") as handle:
        disk = handle.seek(0, os.SEEK_END)
        handle.seek(_SUPERBLOCK_AT)
        superblock = handle.read(1024)
    blocks, block = (int.from_bytes(superblock[at : at + 4], "little") for at in (_BLOCKS_AT, _BLOCK_SIZE_AT))
    blocks |= int.from_bytes(superblock[_BLOCKS_HIGH_AT : _BLOCKS_HIGH_AT + 4], "little") << 32
    size = 1024 << block
    if disk // size - blocks < _MIN_GROWTH // size:
        return
    import fcntl

    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _RESIZE, (disk // size).to_bytes(8, "little"))
    finally:
        os.close(fd)


def _inside(command: list[str], name: str, run: Callable[[list[str]], int], say: Callable[[str], None]) -> None:
    """Mounts something at `name` in the root filesystem, unless that is a link, which might lead out of it."""
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


def find_disk(serial: str) -> str | None:
    """Returns the block device with a serial number; waits at most `_DISK_S` for its driver."""
    end = time.monotonic() + _DISK_S
    while True:
        for name in sorted(os.listdir("/sys/block")):
            if read_text(f"/sys/block/{name}/serial") == serial and os.path.exists(f"/dev/{name}"):
                return f"/dev/{name}"
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


def kernel_error(subject: str) -> str:
    """Returns the last line of the kernel's log that begins with a word."""
    words = ""
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            for _ in range(_MAX_KERNEL_LOG):
                _, _, text = os.read(log, 8192).decode(errors="replace").partition(";")
                if text.startswith(subject):
                    words = ": " + text.splitlines()[0][:300]
        finally:
            os.close(log)
    except OSError:
        pass
    return words
