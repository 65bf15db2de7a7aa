"""A file system in memory that separates what is written from what survives a power cut.

`sync_file` writes a file's bytes to the disk, `sync_directory` the names in a directory. Directories are durable at
once, as nothing here depends on when they are. A power cut removes what lies in RAM. Positions of holes are not kept:
a hole just reads as zeros.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio


class Listening(Protocol):
    """The listener behind the name of a socket."""

    def connect(self) -> trio.abc.Stream:
        """:raises ConnectionRefusedError: the listener is closed."""


@dataclass(eq=False)
class File:
    """A regular file."""

    data: bytearray = field(default_factory=bytearray)
    size: int = 0
    """In bytes; behind `data` there is a hole."""
    synced: bytes = b""
    watchers: list[Watch] = field(default_factory=list)
    appended: Callable[[], None] | None = None

    def touched(self) -> None:
        self.size = max(self.size, len(self.data))
        for watch in self.watchers:
            watch.poke()


@dataclass(eq=False)
class Directory:
    """A directory. Its entries are found by their paths."""

    watchers: list[Watch] = field(default_factory=list)


@dataclass(eq=False)
class Fifo:
    """A named pipe. `reader` takes what is written."""

    reader: Callable[[bytes], None] | None = None


@dataclass(eq=False)
class SocketName:
    """The name of a Unix socket. It stays when the listener is closed."""

    listening: Listening | None


Node = File | Directory | Fifo | SocketName


class Watch:
    """Implements `volant.host.FileWatch`."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    def poke(self) -> None:
        self._changed.set()

    async def wait(self) -> None:
        await self._changed.wait()
        self._changed = trio.Event()


@dataclass
class _Descriptor:
    node: File
    path: Path
    flags: int
    position: int = 0


class Files:
    """All files of a simulated machine. Errors are those of the operating system."""

    def __init__(self, in_ram: Collection[Path], on_disk: Collection[Path] = ()) -> None:
        self._in_ram = tuple(in_ram)
        self._on_disk = tuple(on_disk)
        """Exceptions from `in_ram`."""
        self._nodes: dict[Path, Node] = {Path("/"): Directory()}
        self._disk: dict[Path, bytes] = {}
        self._descriptors: dict[int, _Descriptor] = {}
        self._next_fd = 1000

    # Names

    def find(self, path: Path) -> Node | None:
        return self._nodes.get(path)

    def get(self, path: Path) -> Node:
        node = self._nodes.get(path)
        if node is None:
            raise _error(errno.ENOENT, path)
        return node

    def file(self, path: Path) -> File:
        node = self.get(path)
        if not isinstance(node, File):
            raise _error(errno.EISDIR if isinstance(node, Directory) else errno.EINVAL, path)
        return node

    def put(self, path: Path, node: Node) -> None:
        """Gives a node a name, in place of what has it."""
        parent = self._nodes.get(path.parent)
        if not isinstance(parent, Directory):
            raise _error(errno.ENOENT if parent is None else errno.ENOTDIR, path)
        self._nodes[path] = node
        for watch in parent.watchers:
            watch.poke()

    def mkdir(self, path: Path) -> None:
        for directory in (*reversed(path.parents), path):
            node = self._nodes.get(directory)
            if node is None:
                self.put(directory, Directory())
            elif not isinstance(node, Directory):
                raise _error(errno.EEXIST, path)

    def unlink(self, path: Path) -> None:
        if isinstance(self.get(path), Directory):
            raise _error(errno.EISDIR, path)
        del self._nodes[path]

    def remove_tree(self, path: Path) -> None:
        for name in [path, *self.below(path)]:
            self._nodes.pop(name, None)
            # On the disk too: nothing here relies on a removal that a power cut undoes.
            self._disk.pop(name, None)

    def rename(self, old: Path, new: Path) -> None:
        node = self.get(old)
        del self._nodes[old]
        self.put(new, node)
        if isinstance(node, Directory):
            for path in [path for path in self._nodes if old in path.parents]:
                self._nodes[new / path.relative_to(old)] = self._nodes.pop(path)
            # Durable at once, as directories are.
            for path in [path for path in self._disk if old in path.parents]:
                self._disk[new / path.relative_to(old)] = self._disk.pop(path)

    def copy(self, source: Path, target: Path) -> None:
        node = self.file(source)
        self.put(target, File(bytearray(node.data), node.size))

    def names(self, directory: Path) -> list[str]:
        if not isinstance(self.get(directory), Directory):
            raise _error(errno.ENOTDIR, directory)
        return sorted(path.name for path in self.below(directory) if path.parent == directory)

    def below(self, directory: Path) -> list[Path]:
        """Returns everything in a directory, at any depth."""
        return sorted(_below(self._nodes, directory))

    # Descriptors

    def open(self, path: Path, flags: int) -> int:
        node = self._nodes.get(path)
        if node is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT, path)
            node = File()
            self.put(path, node)
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise _error(errno.EEXIST, path)
        elif flags & os.O_PATH:
            node = File()
        elif not isinstance(node, File):
            raise _error(errno.EISDIR if isinstance(node, Directory) else errno.ENXIO, path)
        self._next_fd += 1
        self._descriptors[self._next_fd] = _Descriptor(node, path, flags)
        return self._next_fd

    def close(self, fd: int) -> None:
        self._of(fd)
        del self._descriptors[fd]

    def read_at(self, fd: int, limit: int, offset: int) -> bytes:
        node = self._of(fd).node
        data = bytes(node.data[offset : offset + limit])
        return data + bytes(min(limit, max(0, node.size - offset)) - len(data)) if len(data) < limit else data

    def write(self, fd: int, data: bytes) -> int:
        descriptor = self._of(fd)
        node = descriptor.node
        at = len(node.data) if descriptor.flags & os.O_APPEND else descriptor.position
        node.data[at : at + len(data)] = data
        descriptor.position = at + len(data)
        node.touched()
        return len(data)

    def seek(self, fd: int, position: int) -> None:
        descriptor = self._of(fd)
        data = descriptor.node.data
        data.extend(bytes(max(0, position - len(data))))
        descriptor.position = position

    def punch(self, fd: int, start: int, length: int) -> None:
        node = self._of(fd).node
        end = min(start + length, len(node.data))
        node.data[start:end] = bytes(max(0, end - start))

    def append(self, path: Path, data: bytes) -> None:
        """Appends to a file, as a process that has it open."""
        node = self._nodes.get(path)
        if isinstance(node, File):
            node.data += data
            node.touched()

    def open_count(self) -> int:
        return len(self._descriptors)

    def forget_descriptors(self) -> None:
        """Closes all descriptors, as their process has ended."""
        self._descriptors.clear()

    # The disk

    def sync_file(self, fd: int) -> None:
        descriptor = self._of(fd)
        node = descriptor.node
        node.synced = bytes(node.data)
        if descriptor.path in self._disk and self._nodes.get(descriptor.path) is node:
            self._disk[descriptor.path] = node.synced

    def sync_directory(self, directory: Path) -> None:
        for path in _below(self._disk, directory):
            if path.parent == directory and path not in self._nodes:
                del self._disk[path]
        for path in _below(self._nodes, directory):
            node = self._nodes[path]
            if path.parent == directory and isinstance(node, File):
                self._disk[path] = node.synced

    def power_cut(self) -> None:
        """Keeps only synced files and directories on a disk."""
        self._descriptors.clear()
        kept: dict[Path, Node] = {}
        for path, node in self._nodes.items():
            if _lies_in(path, self._in_ram) and not _lies_in(path, self._on_disk):
                continue
            if isinstance(node, Directory):
                kept[path] = Directory()
            elif path in self._disk:
                data = self._disk[path]
                kept[path] = File(bytearray(data), len(data), data)
        self._nodes = kept
        for root in self._in_ram:
            self.mkdir(root)

    def _of(self, fd: int) -> _Descriptor:
        descriptor = self._descriptors.get(fd)
        if descriptor is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return descriptor


def _lies_in(path: Path, roots: Collection[Path]) -> bool:
    return any(path == root or root in path.parents for root in roots)


def _below(paths: Iterable[Path], directory: Path) -> list[Path]:
    # As text: this is asked often, and a path's parents are objects that have to be made.
    prefix = str(directory).rstrip("/") + "/"
    return [path for path in paths if str(path).startswith(prefix)]


def _error(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))
