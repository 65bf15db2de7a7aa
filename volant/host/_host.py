"""`Host`: the machine, by facets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ._cgroups import Cgroups
from ._clock import Clock, LinuxClock
from ._descriptors import Descriptors, LinuxDescriptors
from ._disk import Disk, LinuxDisk
from ._files import Files, LinuxFiles
from ._limits import Limits, LinuxLimits
from ._machine import LinuxMachine, Machine
from ._own import Ownership
from ._proc import LinuxProc, Proc
from ._process_memory import LinuxProcessMemory, ProcessMemory
from ._processes import LinuxProcesses, Processes
from ._random import LinuxRandom, Random
from ._sandbox_access import LinuxSandboxAccess, SandboxAccess
from ._scopes import Scopes
from ._sockets import LinuxSockets, Sockets
from ._threads import LinuxThreads, Threads
from ._watches import LinuxWatches, Watches


class Host:
    """Composes the facets of the real machine. A daemon has one; a test replaces single facets or all of them."""

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
        """`scopes`: creates a systemd scope for each hypervisor. `groups`: creates a control group for each instead.
        `users`: users reserved for hypervisors; None: hypervisors run as the daemon's user. `lowers`: whether
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
        """From now on, removes files only below `directories`, and finds, opens and signals only processes whose tag
        begins with `tag_prefix`, whatever a row, a file or a process says."""
        self.own.confine(directories, tag_prefix)
