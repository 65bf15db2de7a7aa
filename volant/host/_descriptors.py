"""The facet for open files: reads and writes by descriptor. None of it waits, but for the disk."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Protocol

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Descriptors(Protocol):
    """All methods raise OSError."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Returns a descriptor that is never inherited and never a controlling terminal. `flags` as for os.open."""

    def close(self, fd: int) -> None:
        """Closes a descriptor."""

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        """Returns up to `limit` bytes from `offset`; none at the end."""

    def write(self, fd: int, data: bytes) -> int:
        """Writes at the descriptor's position, and returns how many bytes were taken."""

    def write_at(self, fd: int, data: bytes, offset: int) -> int:
        """Writes at an offset of a file, and returns how many bytes were taken."""

    def sync(self, fd: int) -> None:
        """Returns once the file's data is on the disk."""

    def punch_hole(self, fd: int, start: int, length: int) -> bool:
        """Frees the space of a range, which then reads as zeros; the file keeps its size. Returns whether the file
        system supports that."""


class LinuxDescriptors(Descriptors):
    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        return os.pread(fd, limit, offset)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def write_at(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def punch_hole(self, fd: int, start: int, length: int) -> bool:
        flags = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        while _libc.fallocate(fd, flags, start, length) != 0:
            code = ctypes.get_errno()
            if code == errno.EOPNOTSUPP:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True
