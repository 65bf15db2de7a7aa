"""The files of the simulated machine, as one daemon sees them.

The database is the one thing that is real (`databases.py`), and is recognized by its suffix.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from actors import fault
from actors.testing import allow_real
from volant.host import Descriptors, Disk, Files, FileWatch, OpenDirectory, Ownership, Watches

from .calls import Calls
from .file_system import Directory, Fifo, File, Watch

_DATABASE = (".db", ".db-wal")


class SimFiles(Files):
    def __init__(self, calls: Calls, own: Ownership) -> None:
        self._calls = calls
        self._machine = calls.machine
        self._files = calls.machine.files
        self._own = own

    async def mkdir(self, path: Path, mode: int = 0o700) -> None:
        def make() -> None:
            if self._files.find(path) is None:
                self._calls.check_space(path)
            self._files.mkdir(path)

        await self._calls.run(make)

    async def read(self, path: Path, limit: int = 2**24) -> bytes:
        return await self._calls.run(lambda: bytes(self._files.file(path).data[:limit]))

    async def read_tail(self, path: Path, limit: int) -> bytes:
        return await self._calls.run(lambda: bytes(self._files.file(path).data[-limit:]))

    async def write(self, path: Path, data: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
        def write() -> None:
            self._calls.check_space(path)
            self._files.put(path, File(bytearray(data), len(data), data if durable else b""))
            if durable:
                self._files.sync_directory(path.parent)

        await self._calls.run(write)

    async def copy(self, source: Path, target: Path, mode: int = 0o600) -> None:
        def copy() -> None:
            self._calls.check_space(target)
            self._files.copy(source, target)

        await self._calls.run(copy)

    async def put_in_place(self, fresh: Path, path: Path) -> None:
        def put() -> None:
            node = self._files.get(fresh)
            if isinstance(node, File):
                node.synced = bytes(node.data)
            self._files.rename(fresh, path)
            self._files.sync_directory(path.parent)

        await self._calls.run(put)

    async def move_directory(self, path: Path, to: Path) -> None:
        def move() -> None:
            if fault("directory.does_not_move"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            if self._files.find(to) is not None and self._files.below(to):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(to))
            self._files.rename(path, to)
            for qemu in self._machine.qemus.values():
                if qemu.directory == path:
                    qemu.directory = to

        await self._calls.run(move)

    async def remove(self, path: Path) -> None:
        self._own.check_removable(path)

        def remove() -> None:
            if self._files.find(path) is not None:
                self._files.unlink(path)

        await self._calls.run(remove)

    async def remove_tree(self, path: Path) -> None:
        self._own.check_removable(path)
        await self._calls.run(lambda: self._files.remove_tree(path))

    async def empty_if_larger(self, path: Path, limit: int) -> bool:
        def empty() -> bool:
            node = self._files.find(path)
            if not isinstance(node, File) or len(node.data) <= limit:
                return False
            node.data.clear()
            node.size = 0
            return True

        return await self._calls.run(empty)

    async def make_fifo(self, path: Path, mode: int = 0o600) -> None:
        def make() -> None:
            if not isinstance(self._files.find(path), Fifo):
                self._files.put(path, Fifo())

        await self._calls.run(make)

    def open_fifo(self, path: Path) -> trio.lowlevel.FdStream:
        self._calls.check()
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))

    def exists(self, path: Path) -> bool:
        self._calls.check()
        if path.name.endswith(_DATABASE):
            with allow_real("files"):
                return path.exists()
        return self._files.find(path) is not None

    def size(self, path: Path) -> int:
        self._calls.check()
        return self._files.file(path).size

    def mode(self, path: Path) -> int:
        self._calls.check()
        self._files.file(path)
        return 0o600

    def fingerprint(self, path: Path) -> str:
        self._calls.check()
        node = self._files.file(path)
        return f"{node.size}.{zlib.crc32(node.data)}"

    def changed_at(self, path: Path) -> float:
        self._calls.check()
        return 0.0

    def names(self, directory: Path) -> list[str]:
        self._calls.check()
        return self._files.names(directory)

    def rename(self, path: Path, to: Path) -> None:
        self._calls.check()
        self._machine.databases.rename(path, to)

    def unlink(self, path: Path) -> None:
        self._calls.check()
        self._own.check_removable(path)
        self._machine.databases.unlink(path)

    def sync_directory(self, path: Path) -> None:
        self._calls.check()
        self._files.sync_directory(path)


class SimDescriptors(Descriptors):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._files = calls.machine.files

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        self._calls.check()
        if path.suffix == ".db" and flags & os.O_CREAT:
            with allow_real("files"):
                path.touch(mode)
        return self._files.open(path, flags)

    def close(self, fd: int) -> None:
        self._calls.check()
        self._files.close(fd)

    async def open_directory(self, base: Path, path: Path, timeout_s: float) -> OpenDirectory:
        def open_it() -> OpenDirectory:
            if fault("host_directory.hangs"):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(path))
            if not isinstance(self._files.get(path), Directory):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            return OpenDirectory(self._files.open(path, os.O_PATH), os.geteuid(), os.getegid())

        return await self._calls.run(open_it)

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        self._calls.check()
        return self._files.read_at(fd, limit, offset)

    def write(self, fd: int, data: bytes) -> int:
        self._calls.check()
        self._calls.check_space()
        if len(data) > 1 and fault("disk.writes_half"):
            data = data[: self._calls.rng.randrange(1, len(data))]
        return self._files.write(fd, data)

    def punch_hole(self, fd: int, start: int, length: int) -> bool:
        self._calls.check()
        self._files.punch(fd, start, length)
        return True


class SimDisk(Disk):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._files = calls.machine.files

    def free(self, path: Path) -> int:
        self._calls.check()
        return 0 if self._calls.machine.disk_full else 2**40

    def used(self, path: Path) -> int:
        self._calls.check()
        if path.name.endswith(_DATABASE):
            with allow_real("files"):
                return path.stat().st_size if path.exists() else 0
        nodes = map(self._files.find, [path, *self._files.below(path)])
        return sum(node.size for node in nodes if isinstance(node, File))

    def unbacked(self, path: Path) -> int:
        self._calls.check()
        return 0

    def reserve(self, path: Path, size: int) -> None:
        self._calls.check()
        self._calls.check_space(path)
        self._files.put(path, File(size=size))

    async def allocate(self, path: Path, size: int, mode: int = 0o600, *, reserve: bool = True) -> None:
        def allocate() -> None:
            self._calls.check_space(path)
            # Only its size matters: no test looks into a simulated guest's memory.
            self._files.put(path, File(size=size))

        await self._calls.run(allocate)

    async def extend(self, path: Path, size: int) -> None:
        def extend() -> None:
            node = self._files.file(path)
            node.size = max(node.size, size)

        await self._calls.run(extend)


class SimWatches(Watches):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @contextmanager
    def open(self, path: Path) -> Iterator[FileWatch]:
        self._calls.check()
        node = self._calls.machine.files.get(path)
        assert isinstance(node, File | Directory)
        watch = Watch()
        node.watchers.append(watch)
        try:
            yield watch
        finally:
            node.watchers.remove(watch)
