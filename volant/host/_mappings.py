"""Copies a guest's memory from its file or from the process that runs it.

A guest that booted cold has its memory in a file of its own. A guest that was restored from a template has a private
mapping of the template's file in its hypervisor's process: a page belongs to the process once it was written to, and to
the file until then. `/proc/<pid>/pagemap` says which, in eight bytes per page; only the last of them matters here.

The file may have lost its name, so it is opened through the process's descriptors. Copies work in pieces, so that a
caller can stop between two of them.

The files in `/proc/<pid>` belong to the process's user, and the daemon need not be able to read every file: for the
moment of opening, a thread acts as that user.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from . import _procfs

PAGE = mmap.PAGESIZE
PIECE = 32 * 1024 * 1024
"""Takes some ten milliseconds."""

_BUFFER = 1024 * 1024
_ENTRY = 8
_FILES = 1 << 5
"""Bit of an entry's last byte: the page belongs to a file, or is shared."""
_THERE = 0b11 << 6
"""Bits: the page is in memory, or swapped out."""
_OWN = bytes(bool(byte & _THERE and not byte & _FILES) for byte in range(256))
_RUN = re.compile(rb"\x01+")


class PrivateMapping(msgspec.Struct, frozen=True):
    """A file that a process has mapped as memory of its own."""

    pid: int
    start: int
    size: int
    file: Path
    """Leads to the file even without a name."""

    def open_file(self) -> int:
        """Returns a descriptor of the file. Raises OSError."""
        with _procfs.as_user_of(self.pid):
            place = os.open(self.file, os.O_PATH | os.O_CLOEXEC)
        try:
            # The file is ours, not that user's.
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)

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
    found: list[tuple[int, str]] = []
    with Path(f"/proc/{pid}/maps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            span, access, offset, _, inode, *name = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(address, 16) for address in span.split("-"))
            if (end - start, access[1:4:2], int(offset, 16)) == (size, "wp", 0) and inode != "0" and name:
                found.append((start, name[0]))
    if len(found) != 1:
        raise FileNotFoundError(f"process {pid} has {len(found)} private mappings of {size} bytes, and not the one")
    start, name_there = found[0]
    with _procfs.as_user_of(pid):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if str(path.readlink()) == name_there and path.is_file():
                    return PrivateMapping(pid, start, size, path)
            except FileNotFoundError:
                continue
    raise FileNotFoundError(f"process {pid} has a mapping of {name_there}, and does not have it open any more")


def copy_piece(source: int, target: int, start: int, size: int) -> int:
    """Copies up to `PIECE` of a file's data, from `start` on, to the same places of another file, and returns where to
    go on; `size` is the end. Raises OSError."""
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
    Returns where to go on, and how many bytes were written. Raises OSError."""
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
