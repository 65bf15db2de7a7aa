"""The facet that inspects processes in `/proc`.

Data read by a pid belongs to the process only if the process had not ended before the read. So each method opens a
handle first, and checks it afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from volant.model import ProcessIdentity

from . import _procfs
from ._processes import Processes, runs_as_ours
from ._procfs import ProcessGone
from ._sandbox import as_user


class ProcessStatus(msgspec.Struct, frozen=True):
    """The rights of a process."""

    user: int
    capabilities: int  #: the capabilities that it has or can gain, one bit each
    no_new_privileges: bool
    filters: int  #: number of seccomp filters


class ProcessUsage(msgspec.Struct, frozen=True):
    """The resource use of a process since its start, and its resident memory."""

    cpu_s: float
    rss_kb: int
    read_bytes: int  #: bytes read from disks, without the page cache
    written_bytes: int


class Proc(Protocol):
    """Information about processes. Methods with an identity raise ProcessGone if there is no such process, or the
    daemon may not inspect it."""

    def command_line(self, identity: ProcessIdentity) -> list[str]:
        """Returns the arguments of a process."""

    def working_directory(self, identity: ProcessIdentity) -> Path:
        """Returns the working directory of a process, under its current name."""

    def status(self, identity: ProcessIdentity) -> ProcessStatus:
        """Returns the rights of a process."""

    def wakeups(self, identity: ProcessIdentity) -> int:
        """Returns how often the threads of a process have waited and were woken. Ended threads don't count, so the
        number may fall."""

    def usage(self, identity: ProcessIdentity) -> ProcessUsage:
        """Returns the resource use of a process. Cheap: its mappings are not walked."""

    def is_ours(self, identity: ProcessIdentity) -> bool:
        """Returns whether a process runs as the daemon's user, or as a hypervisor's."""

    def has_open(self, identity: ProcessIdentity, path: Path) -> bool:
        """Returns whether a process has an existing file open. Compares files, not names, as the process may see other
        names."""

    async def users(self) -> frozenset[int]:
        """Returns the users that have processes. Reads all of /proc."""


class LinuxProc(Proc):
    def __init__(self, processes: Processes, users: range) -> None:
        """Creates it. `users` are reserved for hypervisors."""
        self._processes = processes
        self._users = users

    def command_line(self, identity: ProcessIdentity) -> list[str]:
        with self._inspected(identity) as pid:
            words = _procfs.command_line(pid).rstrip(b"\0").split(b"\0")
        return [os.fsdecode(word) for word in words]

    def working_directory(self, identity: ProcessIdentity) -> Path:
        with self._inspected(identity) as pid:
            return (_procfs.PROC / str(pid) / "cwd").readlink()

    def status(self, identity: ProcessIdentity) -> ProcessStatus:
        with self._inspected(identity) as pid:
            fields = _procfs.status(pid)
        permitted, inherited, bound = (int(fields[name][0], 16) for name in ("CapPrm", "CapInh", "CapBnd"))
        no_new_privileges = fields["NoNewPrivs"][0] == "1"
        return ProcessStatus(
            user=int(fields["Uid"][1]),
            capabilities=permitted if no_new_privileges else permitted | inherited | bound,
            no_new_privileges=no_new_privileges,
            filters=int(fields.get("Seccomp_filters", fields["Seccomp"])[0]),
        )

    def wakeups(self, identity: ProcessIdentity) -> int:
        with self._inspected(identity) as pid:
            return _procfs.wakeups(pid)

    def usage(self, identity: ProcessIdentity) -> ProcessUsage:
        with self._inspected(identity) as pid:
            return ProcessUsage(*_procfs.usage(pid))

    def is_ours(self, identity: ProcessIdentity) -> bool:
        with self._inspected(identity) as pid:
            return runs_as_ours(pid, self._users)

    def has_open(self, identity: ProcessIdentity, path: Path) -> bool:
        try:
            wanted = path.stat()
        except OSError:
            return False
        with self._inspected(identity) as pid:
            place = _procfs.PROC / str(pid)

            def look() -> bool:
                for descriptor in (place / "fd").iterdir():
                    with suppress(FileNotFoundError):
                        if os.path.samestat(descriptor.stat(), wanted):
                            return True
                return False

            try:
                return look()
            except PermissionError:
                # Root as a service has no right to read what is another user's, but may act for that user.
                if os.geteuid() != 0:
                    raise
                return as_user(place.stat().st_uid, look)

    async def users(self) -> frozenset[int]:
        def scan() -> frozenset[int]:
            found = set()
            for pid in _procfs.pids():
                with suppress(OSError):
                    found.add((_procfs.PROC / str(pid)).stat().st_uid)
            return frozenset(found)

        return await trio.to_thread.run_sync(scan)

    @contextmanager
    def _inspected(self, identity: ProcessIdentity) -> Iterator[int]:
        with self._processes.open(identity) as process:
            try:
                yield process.pid
            except (OSError, ValueError) as error:
                _procfs.raise_shortage(error)
                raise ProcessGone(f"process {identity.pid} can't be inspected: {error}") from error
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
