"""A guest's memory, copied out of its file or out of the process that runs it.

A guest that booted has its memory in a file of its own. One that goes on from somebody else's has a private mapping of
that file in its hypervisor's process: a page is the process's own once it was written to, and the file's until then.
The kernel tells which in `/proc/<pid>/pagemap`, eight bytes for a page, of which the last holds all that matters here.

The file may have lost its name, so it is opened as what the process has open. All of it works in pieces, so that who
copies can stop between two of them.

What `/proc` has of a process belongs to the process's user, and a daemon that has to see it need not be one who may
read everything: for the moment of opening, a thread is that user to file systems, and nobody else is.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PAGE = mmap.PAGESIZE
PIECE = 32 * 1024 * 1024
"""Some ten milliseconds' work."""

_BUFFER = 1024 * 1024
_ENTRY = 8
_FILES = 1 << 5
"""Of an entry's last byte: the page is one of a file, or shared."""
_THERE = 0b11 << 6
"""Likewise: it is in memory, or swapped out."""
_OWN = bytes(bool(byte & _THERE and not byte & _FILES) for byte in range(256))
_RUN = re.compile(rb"\x01+")
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class PrivateMapping:
    """Where a process has a file mapped as memory of its own."""

    pid: int
    start: int
    size: int
    file: Path
    """Leads to the file, whatever became of its name."""

    def open_file(self) -> int:
        """A descriptor of the file. Raises OSError."""
        with _as_user_of(self.pid):
            place = os.open(self.file, os.O_PATH | os.O_CLOEXEC)
        try:
            # The file is not that user's but ours.
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)

    def open_memory(self) -> int:
        """A descriptor of the process's memory. Raises OSError."""
        return self._open("mem")

    def open_pagemap(self) -> int:
        """A descriptor of what is where in it. Raises OSError."""
        return self._open("pagemap")

    def _open(self, name: str) -> int:
        with _as_user_of(self.pid):
            return os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)


def find_private_mapping(pid: int, size: int) -> PrivateMapping:
    """The writable private mapping of a file's first `size` bytes in a process. Raises OSError; FileNotFoundError when
    there is none, or more than one."""
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
    with _as_user_of(pid):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if str(path.readlink()) == name_there and path.is_file():
                    return PrivateMapping(pid, start, size, path)
            except FileNotFoundError:
                continue
    raise FileNotFoundError(f"process {pid} has a mapping of {name_there}, and does not have it open any more")


@contextmanager
def _as_user_of(pid: int) -> Iterator[None]:
    """In this block, in which nobody may wait for anything else, this thread opens files as a process's user would. For
    who may not be that, nothing is different."""
    figures = Path(f"/proc/{pid}").stat()
    _libc.setfsgid(figures.st_gid)
    _libc.setfsuid(figures.st_uid)
    try:
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def copy_piece(source: int, target: int, start: int, size: int) -> int:
    """Copy a file's data from `start` on to the same places of another, some `PIECE` of it: where to go on; `size` is
    the end. Raises OSError."""
    left = PIECE
    while start < size and left > 0:
        try:
            # Over a large hole only once: the kernel looks at each page of it, where the room for it was taken.
            start = os.lseek(source, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return size  # nothing but a hole is left
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
    """Write pages of a mapping, from `start` on, to the same places of a file, if they are the process's own, some
    `PIECE` of them: where to go on, and how many bytes they were. `memory` and `pagemap` are the process's. Raises
    OSError."""
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
    """Ranges of pages that are the process's own, in bytes from the mapping's start."""
    length = (end - start) // PAGE * _ENTRY
    entries = os.pread(pagemap, length, (mapping.start + start) // PAGE * _ENTRY)
    if len(entries) != length:
        raise ProcessLookupError(f"process {mapping.pid} has ended")
    for run in _RUN.finditer(entries[_ENTRY - 1 :: _ENTRY].translate(_OWN)):
        yield start + run.start() * PAGE, start + run.end() * PAGE
