"""Copies a guest's memory from its file or from the process that runs it.

A guest that booted cold has its own file with its memory. A guest that was restored from a template has a private
mapping of the template's file in its hypervisor's process: a page belongs to the process once it was written to, and to
the file until then. `/proc/<pid>/pagemap` shows this in eight bytes per page, of which only the last matters here.

The file may have lost its name, so it is opened through the process's descriptors, and compared with the mapping.
Copies work in pieces, so that a caller can stop between two of them.

The files in `/proc/<pid>` belong to the process's user, and the daemon need not be able to read every file: for the
moment of opening, a thread acts as that user.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from . import _procfs

PAGE = mmap.PAGESIZE
PIECE = 32 * 1024 * 1024
"""The size of a piece, whose copy takes some ten milliseconds."""

_BUFFER = 1024 * 1024
_ENTRY = 8
_FILES = 1 << 5
"""A bit of an entry's last byte: the page belongs to a file, or is shared."""
_THERE = 0b11 << 6
"""Bits: the page is in memory, or swapped out."""
_OWN = bytes(bool(byte & _THERE and not byte & _FILES) for byte in range(256))
_RUN = re.compile(rb"\x01+")


class PrivateMapping(msgspec.Struct, frozen=True):
    """A file that a process has mapped privately as memory."""

    pid: int
    start: int
    size: int
    name: str
    """The file's name at the time of its opening."""
    identity: str
    """Its device and inode, as `/proc/<pid>/maps` shows them."""

    def open_file(self) -> int:
        """Returns a descriptor of the file, which may have lost its name. Raises OSError; FileNotFoundError unless the
        process has it open, it belongs to the daemon and it has that size.

        A process may have an `O_PATH` descriptor of any file, and replace a descriptor by it at any time. So the opened
        file is compared with the mapping, which requires the right to read the file.
        """
        with _procfs.as_user_of(self.pid):
            paths = list(Path(f"/proc/{self.pid}/fd").iterdir())
        for path in paths:
            try:
                with _procfs.as_user_of(self.pid):
                    if str(path.readlink()) != self.name:
                        continue
                    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                found = self._open_again(place)
            finally:
                os.close(place)
            if found is not None:
                return found
        raise FileNotFoundError(f"process {self.pid} has a mapping of {self.name}, and does not have it open any more")

    def _open_again(self, place: int) -> int | None:
        """Returns a descriptor for reading, if this is the mapped file. Raises OSError."""
        figures = os.fstat(place)
        is_ours = stat.S_ISREG(figures.st_mode) and figures.st_uid == os.geteuid() and figures.st_size == self.size
        if not is_ours:
            return None
        # The file is ours, not that user's.
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        if _identity_of(fd) == self.identity:
            return fd
        os.close(fd)
        return None

    def open_memory(self) -> int:
        """Returns a descriptor of the process's memory. Raises OSError."""
        return self._open("mem")

    def open_pagemap(self) -> int:
        """Returns a descriptor of the process's page map. Raises OSError."""
        return self._open("pagemap")

    def _open(self, name: str) -> int:
        with _procfs.as_user_of(self.pid):
            return os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)


def find_private_mapping(pid: int, size: int) -> PrivateMapping:
    """Returns the writable private mapping of a file's first `size` bytes in a process. Raises OSError;
    FileNotFoundError unless there is exactly one."""
    found = [
        PrivateMapping(pid, line.start, size, line.name, line.identity)
        for line in _maps(pid)
        if (line.end - line.start, line.access[1:4:2], line.offset) == (size, "wp", 0) and line.name
    ]
    if len(found) != 1:
        raise FileNotFoundError(f"process {pid} has {len(found)} private mappings of {size} bytes, and not the one")
    return found[0]


class _Mapped(NamedTuple):
    """A line of `/proc/<pid>/maps`."""

    start: int
    end: int
    access: str
    offset: int
    identity: str
    name: str
    """The file's name; empty without a file."""


def _maps(pid: int | str) -> Iterator[_Mapped]:
    with Path(f"/proc/{pid}/maps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, access, offset, device, inode, *name = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(address, 16) for address in span.split("-"))
            is_file = inode != "0" and name
            yield _Mapped(start, end, access, int(offset, 16), f"{device} {inode}", name[0] if is_file else "")


def _identity_of(fd: int) -> str:
    """Returns a file's device and inode in the form of `maps`, which differ from those of `stat` on some file systems
    (Btrfs, overlayfs). Raises OSError."""
    with mmap.mmap(fd, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        start = ctypes.addressof(first)
        # A mapping can't be closed before what refers to it.
        del first
        return next(line.identity for line in _maps("self") if line.start <= start < line.end)


def copy_piece(source: int, target: int, start: int, size: int) -> int:
    """Copies up to `PIECE` of a file's data, from `start` on, to the same places of another file. Returns the next
    `start`; `size` is the end. Raises OSError."""
    left = PIECE
    while start < size and left > 0:
        try:
            # Only once for a large hole: the kernel looks at each page of it if its space is reserved.
            start = os.lseek(source, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return size  # the rest is a hole
            raise
        end = min(start + left, os.lseek(source, start, os.SEEK_HOLE))
        os.lseek(target, start, os.SEEK_SET)
        left -= end - start
        while start < end:
            sent = os.sendfile(target, source, start, end - start)
            if not sent:
                raise OSError(errno.EIO, "the file was cut while it was copied")
            start += sent
    return start


def copy_own_piece(mapping: PrivateMapping, memory: int, pagemap: int, target: int, start: int) -> tuple[int, int]:
    """Writes up to `PIECE` of the process's own pages of a mapping, from `start` on, to the same places of a file.
    Returns the next `start` and the number of written bytes. Raises OSError."""
    buffer = memoryview(bytearray(_BUFFER))
    copied = 0
    while start < mapping.size and copied < PIECE:
        end = min(start + PIECE, mapping.size)
        for first, last in _own_runs(mapping, pagemap, start, end):
            at = first
            while at < last:
                count = os.preadv(memory, [buffer[: last - at]], mapping.start + at)
                if not count:
                    raise ProcessLookupError(f"process {mapping.pid} has ended")
                written = 0
                while written < count:
                    written += os.pwrite(target, buffer[written:count], at + written)
                at += count
            copied += last - first
        start = end
    return start, copied


def _own_runs(mapping: PrivateMapping, pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the ranges of the process's own pages, in bytes from the mapping's start."""
    length = (end - start) // PAGE * _ENTRY
    entries = os.pread(pagemap, length, (mapping.start + start) // PAGE * _ENTRY)
    if len(entries) != length:
        raise ProcessLookupError(f"process {mapping.pid} has ended")
    for run in _RUN.finditer(entries[_ENTRY - 1 :: _ENTRY].translate(_OWN)):
        yield start + run.start() * PAGE, start + run.end() * PAGE
