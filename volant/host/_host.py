"""`Host`: the machine, by facets."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from ._cgroups import Cgroups
from ._descriptors import Descriptors, LinuxDescriptors
from ._disk import Disk, LinuxDisk
from ._files import Files, LinuxFiles
from ._limits import Limits, LinuxLimits
from ._machine import LinuxMachine, Machine
from ._own import Ownership
from ._proc import LinuxProc, Proc
from ._process_memory import LinuxProcessMemory, ProcessMemory
from ._processes import LinuxProcesses, Processes
from ._sandbox_access import LinuxSandboxAccess, SandboxAccess
from ._scopes import Scopes
from ._sockets import LinuxSockets, Sockets
from ._watches import LinuxWatches, Watches

T = TypeVar("T")


class Threads(Protocol):
    async def run(self, call: Callable[..., T], *args: object) -> T:
        """Runs a call that blocks on the disk in a worker thread. It can't be cancelled in the middle."""


class LinuxThreads(Threads):
    async def run(self, call: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(call, *args)


class Random(Protocol):
    def new_id(self) -> str:
        """Returns 32 hexadecimal digits that were never returned before."""

    def token_bytes(self, size: int) -> bytes:
        """Returns `size` random bytes, suitable for keys."""


class LinuxRandom(Random):
    def new_id(self) -> str:
        return uuid.uuid4().hex

    def token_bytes(self, size: int) -> bytes:
        return os.urandom(size)


class Clock(Protocol):
    def now(self) -> datetime:
        """Returns the time of day in UTC. It may jump."""

    def monotonic(self) -> float:
        """Returns seconds on a monotonic clock, for measurements."""

    def boottime(self) -> float:
        """Returns seconds since the host was booted. This clock can't be set, and continues while the host sleeps."""


class LinuxClock(Clock):
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


class Host:
    """The facets of the real machine. A daemon has one; a test replaces single facets or all of them."""

    clock: Clock
    random: Random
    threads: Threads
    machine: Machine
    processes: Processes
    proc: Proc
    process_memory: ProcessMemory
    limits: Limits
    sandbox: SandboxAccess
    files: Files
    descriptors: Descriptors
    disk: Disk
    watches: Watches
    sockets: Sockets
    own: Ownership

    def __init__(
        self,
        scopes: Scopes | None = None,
        groups: Cgroups | None = None,
        users: range | None = None,
        *,
        lowers: bool = False,
    ) -> None:
        """Creates it. `scopes` creates a systemd scope for each hypervisor; `groups` creates a control group for each
        instead. `users` are reserved for hypervisors; None if they run as the daemon's user. `lowers` is whether
        hypervisors get less processor time than the daemon."""
        # Only root can have given processes another user.
        reserved = users if users is not None and os.geteuid() == 0 else range(0)
        self.own = Ownership()
        self.clock = LinuxClock()
        self.random = LinuxRandom()
        self.threads = LinuxThreads()
        self.processes = LinuxProcesses(self.own, reserved)
        self.proc = LinuxProc(self.processes, reserved)
        self.process_memory = LinuxProcessMemory(self.processes)
        self.limits = LinuxLimits(self.processes, scopes, groups, lowers=lowers)
        self.sandbox = LinuxSandboxAccess()
        self.files = LinuxFiles(self.own)
        self.descriptors = LinuxDescriptors()
        self.disk = LinuxDisk()
        self.machine = LinuxMachine(self.disk)
        self.watches = LinuxWatches()
        self.sockets = LinuxSockets()

    def confine(self, directories: Sequence[Path], tag_prefix: str) -> None:
        """Restricts the daemon: from now on it removes files only below `directories`, and finds, opens and signals
        only processes whose tag begins with `tag_prefix`, whatever a row, a file or a process contains."""
        self.own.confine(directories, tag_prefix)
