"""The facet for the memory of processes: their use, and copies of a guest's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from volant.model import ProcessIdentity

from . import _mappings
from ._files import copy_in_pieces, open_descriptor
from ._processes import Process, Processes
from ._procfs import ProcessGone

_PROC = Path("/proc")
_READERS = 2
"""Maximum threads that read `smaps_rollup`: the kernel walks all mappings, which takes each milliseconds of a
processor."""


class MemoryUsage(msgspec.Struct, frozen=True):
    """The memory use of a process."""

    rss_kb: int  #: all mapped pages that are in memory
    pss_kb: int  #: the same, with shared pages divided by their users; the sum over all processes is their total
    private_kb: int  #: mapped by no other process; free once it ends, unless it belongs to a file
    shared_kb: int  #: mapped by other processes too


class ProcessMemory(Protocol):
    async def usage(self, identity: ProcessIdentity, timeout_s: float) -> MemoryUsage:
        """Returns the memory use of a process. Costs some milliseconds per GiB, so it is read on demand.

        Raises ProcessGone, trio.TooSlowError, OSError if the process may not be inspected.
        """

    async def copy_mapped_file(self, identity: ProcessIdentity, size: int, target: Path, mode: int = 0o600) -> None:
        """Copies the file behind the process's only private mapping of `size` bytes to a new file, like `Files.copy`.
        The copy does not contain pages that the process has written. Raises ProcessGone, OSError; PermissionError if
        the process may not be inspected."""

    async def copy_own_pages(self, identity: ProcessIdentity, size: int, target: Path) -> int:
        """Writes the pages of that mapping that the process has written to the same places of `target`, in pieces.
        Returns their bytes. Raises the errors of `copy_mapped_file`."""


class LinuxProcessMemory(ProcessMemory):
    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._limiter = trio.CapacityLimiter(_READERS)

    async def usage(self, identity: ProcessIdentity, timeout_s: float) -> MemoryUsage:
        with self._processes.open(identity) as process, trio.fail_after(timeout_s):
            try:
                # It waits for the lock of the mappings, for ever if the process that holds the lock hangs.
                text = await trio.to_thread.run_sync(
                    (_PROC / str(process.pid) / "smaps_rollup").read_text, abandon_on_cancel=True, limiter=self._limiter
                )
            except (FileNotFoundError, ProcessLookupError) as error:
                raise ProcessGone(f"process {identity.pid} has ended") from error
            _check_alive(process)
            if not text:
                raise ProcessGone(f"process {identity.pid} has ended")
            return _parse_rollup(text)

    async def copy_mapped_file(self, identity: ProcessIdentity, size: int, target: Path, mode: int = 0o600) -> None:
        with self._processes.open(identity) as process:
            mapping = await trio.to_thread.run_sync(_mappings.find_private_mapping, process.pid, size)
            with _closing(await trio.to_thread.run_sync(mapping.open_file)) as source:
                _check_alive(process)
                await copy_in_pieces(source, target, mode, size)

    async def copy_own_pages(self, identity: ProcessIdentity, size: int, target: Path) -> int:
        with self._processes.open(identity) as process:
            mapping = await trio.to_thread.run_sync(_mappings.find_private_mapping, process.pid, size)
            with (
                _closing(mapping.open_memory()) as memory,
                _closing(mapping.open_pagemap()) as pagemap,
                open_descriptor(target, os.O_WRONLY) as copy,
            ):
                _check_alive(process)
                at = copied = 0
                try:
                    while at < size:
                        at, more = await trio.to_thread.run_sync(
                            _mappings.copy_own_piece, mapping, memory, pagemap, copy, at
                        )
                        copied += more
                except ProcessLookupError as error:
                    raise ProcessGone(str(error)) from error
                return copied


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _check_alive(process: Process) -> None:
    """Checks that a process is alive, so that data opened by its pid belongs to it. :raises ProcessGone:"""
    if process.exited:
        raise ProcessGone(f"process {process.pid} has ended")


def _parse_rollup(rollup: str) -> MemoryUsage:
    figures = {}
    for line in rollup.splitlines()[1:]:
        name, _, rest = line.partition(":")
        figures[name] = int(rest.split()[0])
    return MemoryUsage(
        rss_kb=figures["Rss"],
        pss_kb=figures["Pss"],
        private_kb=figures["Private_Clean"] + figures["Private_Dirty"],
        shared_kb=figures["Shared_Clean"] + figures["Shared_Dirty"],
    )
