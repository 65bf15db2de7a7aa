"""The facet for open files: reads and writes by descriptor. Methods that are not `async` only wait for the disk."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import trio

from ._walk import open_path

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class OpenDirectory(NamedTuple):
    """An open directory of the host, whatever has its name now."""

    fd: int
    owner: int
    group: int


class Descriptors(Protocol):
    """All methods raise OSError."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Returns a descriptor that is never inherited and never a controlling terminal. For `flags` see os.open."""

    def close(self, fd: int) -> None:
        """Closes a descriptor."""

    async def open_directory(self, base: Path, path: Path, timeout_s: float) -> OpenDirectory:
        """Opens the directory `path`, which is `base` or inside it, only as a reference. Fails with ELOOP if a part of
        the path from `base` is a symbolic link, and with ETIMEDOUT if its file system hangs."""

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        """Returns up to `limit` bytes from `offset`; empty at the end."""

    def write(self, fd: int, data: bytes) -> int:
        """Writes at the descriptor's position, and returns the number of written bytes."""

    def punch_hole(self, fd: int, start: int, length: int) -> bool:
        """Frees the space of a range, which then reads as zeros; the file keeps its size. Returns whether the file
        system supports that."""


class LinuxDescriptors(Descriptors):
    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    async def open_directory(self, base: Path, path: Path, timeout_s: float) -> OpenDirectory:
        waits = True
        unclaimed: list[int] = []
        """The opened descriptor. Code that takes it out must close it or pass it on."""

        def close_unclaimed() -> None:
            with suppress(IndexError):
                os.close(unclaimed.pop())

        def open_it() -> os.stat_result:
            unclaimed.append(open_path(path, os.O_PATH | os.O_DIRECTORY, within=base, links=False))
            if not waits:
                close_unclaimed()
                raise TimeoutError
            return os.fstat(unclaimed[0])

        try:
            with trio.fail_after(timeout_s):
                figures = await trio.to_thread.run_sync(open_it, abandon_on_cancel=True)
            return OpenDirectory(unclaimed.pop(), figures.st_uid, figures.st_gid)
        except trio.TooSlowError:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(path)) from None
        finally:
            waits = False
            close_unclaimed()

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        return os.pread(fd, limit, offset)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def punch_hole(self, fd: int, start: int, length: int) -> bool:
        flags = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        while _libc.fallocate(fd, flags, start, length) != 0:
            code = ctypes.get_errno()
            if code == errno.EOPNOTSUPP:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True
