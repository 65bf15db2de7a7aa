"""The facet for files and directories by their names."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import trio

from . import _mappings
from ._directories import make_own_directory
from ._own import Ownership

_logger = logging.getLogger("volant.host")

_FICLONE = 0x40049409
_READ_LIMIT = 16 * 1024 * 1024


class Files(Protocol):
    """Files and directories. All methods raise OSError. Methods that are not async are for worker threads, or access no
    disk."""

    async def mkdir(self, path: Path, mode: int = 0o700) -> None:
        """Creates a directory and its parents, with this mode whatever the umask. An existing one must belong to the
        daemon; see `make_own_directory`."""

    async def read(self, path: Path, limit: int = _READ_LIMIT) -> bytes:
        """Returns the first `limit` bytes of a file."""

    async def read_tail(self, path: Path, limit: int) -> bytes:
        """Returns the last `limit` bytes of a file."""

    async def write(self, path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
        """Replaces a file by one with this content, atomically, even after a power cut unless not `durable`."""

    async def copy(self, source: Path, target: Path, mode: int = 0o600) -> None:
        """Copies a file to a new one: by reference if the file system supports it, otherwise without its holes, in
        pieces. When cancelled, it leaves an incomplete copy. The copy is not on the disk before `put_in_place`. Raises
        OSError, also if `target` exists."""

    async def put_in_place(self, fresh: Path, path: Path) -> None:
        """Renames a finished file in the same directory, in place of an existing one. File and name are on the disk
        when this returns. A directory whose files are on the disk can be renamed to a free name in the same way."""

    async def move_directory(self, path: Path, to: Path) -> None:
        """Renames a directory on its file system, in place of an empty one. Open files and bound sockets in it move
        along."""

    async def remove(self, path: Path) -> None:
        """Removes a file, if it exists. Raises OSError, also for a file that does not belong to the daemon."""

    async def remove_tree(self, path: Path) -> None:
        """Removes a directory with its content, or a file, if it exists. Follows no link. Raises OSError, also for
        files that don't belong to the daemon."""

    async def empty_if_larger(self, path: Path, limit: int) -> bool:
        """Truncates a file to zero bytes if it is larger than `limit` bytes, and returns whether it was.

        For a file that another process appends to. Keeping its end would race with the writer.
        """

    async def make_fifo(self, path: Path, mode: int = 0o600) -> None:
        """Creates a named pipe unless there is one. Raises FileExistsError if the path is something else."""

    def open_fifo(self, path: Path) -> trio.lowlevel.FdStream:
        """Returns the writing end of a named pipe, which must be closed. Raises OSError, with ENXIO if no process
        reads."""

    def exists(self, path: Path) -> bool:
        """Returns whether `path` exists."""

    def size(self, path: Path) -> int:
        """Returns the size of a file in bytes."""

    def mode(self, path: Path) -> int:
        """Returns the permission bits of a file."""

    def fingerprint(self, path: Path) -> str:
        """Returns a text that changes when a file is written to or replaced: inode, size and modification time."""

    def changed_at(self, path: Path) -> float:
        """Returns when a file or directory was last modified, in seconds since 1970."""

    def names(self, directory: Path) -> list[str]:
        """Returns the names in a directory, sorted."""

    def rename(self, path: Path, to: Path) -> None:
        """Renames a file in its directory, in place of an existing one. The name is on the disk when this returns."""

    def unlink(self, path: Path) -> None:
        """Removes a file like `remove`, in a worker thread."""

    def sync_directory(self, path: Path) -> None:
        """Writes the names in a directory to the disk."""


class LinuxFiles(Files):
    def __init__(self, own: Ownership) -> None:
        self._own = own

    async def mkdir(self, path: Path, mode: int = 0o700) -> None:
        warning = await trio.to_thread.run_sync(make_own_directory, path, mode)
        if warning is not None:
            _logger.warning("%s", warning)

    async def read(self, path: Path, limit: int = _READ_LIMIT) -> bytes:
        def read() -> bytes:
            with path.open("rb") as file:
                return file.read(limit)

        return await trio.to_thread.run_sync(read)

    async def read_tail(self, path: Path, limit: int) -> bytes:
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
                return file.read(limit)

        return await trio.to_thread.run_sync(read)

    async def write(self, path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
        def write() -> None:
            fresh = path.with_name(f".{path.name}.{uuid4().hex}")
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    if durable:
                        os.fsync(fd)
                if durable:
                    self.rename(fresh, path)
                else:
                    fresh.rename(path)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise

        await trio.to_thread.run_sync(write)

    async def copy(self, source: Path, target: Path, mode: int = 0o600) -> None:
        # It may be somebody's file: to open a pipe would wait for a writer.
        with open_descriptor(source, os.O_RDONLY | os.O_NONBLOCK) as reader:
            if not stat.S_ISREG(os.fstat(reader).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", str(source))
            await copy_in_pieces(reader, target, mode)

    async def put_in_place(self, fresh: Path, path: Path) -> None:
        def put() -> None:
            with open_descriptor(fresh, os.O_RDONLY) as fd:
                os.fsync(fd)
            self.rename(fresh, path)

        await trio.to_thread.run_sync(put)

    async def move_directory(self, path: Path, to: Path) -> None:
        await trio.to_thread.run_sync(os.rename, path, to)

    async def remove(self, path: Path) -> None:
        await trio.to_thread.run_sync(self.unlink, path)

    async def remove_tree(self, path: Path) -> None:
        self._own.check_removable(path)

        def remove() -> None:
            with suppress(FileNotFoundError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

        await trio.to_thread.run_sync(remove)

    async def empty_if_larger(self, path: Path, limit: int) -> bool:
        try:
            # Mostly it is not, and to find that out needs no thread.
            if self.size(path) <= limit:
                await trio.lowlevel.checkpoint()
                return False
            await trio.to_thread.run_sync(os.truncate, path, 0)
        except FileNotFoundError:
            return False
        return True

    async def make_fifo(self, path: Path, mode: int = 0o600) -> None:
        def make() -> None:
            try:
                os.mkfifo(path, mode)
            except FileExistsError:
                if not path.is_fifo():
                    raise

        await trio.to_thread.run_sync(make)

    def open_fifo(self, path: Path) -> trio.lowlevel.FdStream:
        return trio.lowlevel.FdStream(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))

    def exists(self, path: Path) -> bool:
        return path.exists()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def mode(self, path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    def fingerprint(self, path: Path) -> str:
        figures = path.stat()
        return f"{figures.st_ino}.{figures.st_size}.{figures.st_mtime_ns}"

    def changed_at(self, path: Path) -> float:
        return path.stat().st_mtime

    def names(self, directory: Path) -> list[str]:
        return sorted(entry.name for entry in directory.iterdir())

    def rename(self, path: Path, to: Path) -> None:
        path.replace(to)
        self.sync_directory(to.parent)

    def unlink(self, path: Path) -> None:
        self._own.check_removable(path)
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        with open_descriptor(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)


@contextmanager
def open_descriptor(path: Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    """Opens a file for the block. Raises OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


async def copy_in_pieces(reader: int, target: Path, mode: int, size: int | None = None) -> None:
    """Copies an open file like `Files.copy`, or its first `size` bytes."""
    with open_descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode) as writer:
        if await trio.to_thread.run_sync(_share_blocks, reader, writer):
            if size is not None:
                os.ftruncate(writer, size)
            return
        if size is None:
            size = os.fstat(reader).st_size
        os.ftruncate(writer, size)
        at = 0
        while at < size:
            at = await trio.to_thread.run_sync(_mappings.copy_piece, reader, writer, at, size)


def _share_blocks(source: int, target: int) -> bool:
    """Makes a file a copy that takes no space until either is written to, and returns whether that is supported."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True
