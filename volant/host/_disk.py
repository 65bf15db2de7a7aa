"""The facet for space on file systems."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

import trio


class Disk(Protocol):
    def free(self, path: Path) -> int:
        """Returns the free bytes on the file system of `path`. Raises OSError."""

    def used(self, path: Path) -> int:
        """Returns the bytes that a file, or a directory with its content, takes up on the disk; 0 if it does not exist.
        Follows no link."""

    def unbacked(self, path: Path) -> int:
        """Returns the bytes by which the files at `path` may still grow on the disk within their size, which is the
        size of their holes. 0 if nothing exists there. Follows no link."""

    def reserve(self, path: Path, size: int) -> None:
        """Creates a file that takes up `size` bytes of the disk, or none at all. Raises OSError."""

    async def allocate(self, path: Path, size: int, mode: int = 0o600, *, reserve: bool = True) -> None:
        """Creates an empty file of `size` bytes, in place of an existing one. With `reserve` all of its space is
        allocated now, so that a later write to a mapping of it cannot fail (SIGBUS).

        Raises OSError, with ENOSPC if there is not enough space; no file is left in that case.
        """

    async def extend(self, path: Path, size: int) -> None:
        """Extends a file to `size` bytes with a hole at its end. Its length is on the disk when this returns. Never
        shortens it. Raises OSError."""


class LinuxDisk(Disk):
    def free(self, path: Path) -> int:
        figures = os.statvfs(path)
        return figures.f_bavail * figures.f_frsize

    def used(self, path: Path) -> int:
        try:
            figures = path.lstat()
            used = figures.st_blocks * 512
            if stat.S_ISDIR(figures.st_mode):
                used += sum(self.used(inner) for inner in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            # Another process removes it meanwhile.
            return 0
        return used

    def unbacked(self, path: Path) -> int:
        try:
            figures = path.lstat()
            if stat.S_ISDIR(figures.st_mode):
                return sum(self.unbacked(inner) for inner in path.iterdir())
            return max(0, figures.st_size - figures.st_blocks * 512) if stat.S_ISREG(figures.st_mode) else 0
        except (FileNotFoundError, NotADirectoryError):
            # Another process removes it meanwhile.
            return 0

    def reserve(self, path: Path, size: int) -> None:
        _make(path, size, 0o600, reserve=True)

    async def allocate(self, path: Path, size: int, mode: int = 0o600, *, reserve: bool = True) -> None:
        def allocate() -> None:
            path.unlink(missing_ok=True)
            _make(path, size, mode, reserve=reserve)

        await trio.to_thread.run_sync(allocate)

    async def extend(self, path: Path, size: int) -> None:
        def extend() -> None:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_size < size:
                    os.ftruncate(fd, size)
                    os.fsync(fd)
            finally:
                os.close(fd)

        await trio.to_thread.run_sync(extend)


def _make(path: Path, size: int, mode: int, *, reserve: bool) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.ftruncate(fd, size)
        if reserve:
            os.posix_fallocate(fd, 0, size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
