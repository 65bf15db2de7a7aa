"""The simulated machine: processes, files and clocks. It exists whether or not a daemon runs on it."""

from __future__ import annotations

import signal
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import trio

from volant.model import ProcessIdentity

from .databases import Databases
from .file_system import Files
from .images import SimRegistry
from .listener import SimListener
from .network import SimLinks
from .passt import SimPasst
from .process import SimProcess
from .qemu import SimQemu
from .virtiofsd import SimVirtiofsd

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_TICKS_PER_S = 100


class Machine:
    """`nursery` runs its processes."""

    def __init__(
        self,
        rng: Random,
        nursery: trio.Nursery,
        databases: Databases,
        *,
        in_ram: Collection[Path],
        on_disk: Collection[Path] = (),
        memory_mb: int = 16384,
    ) -> None:
        self.rng = rng
        self.nursery = nursery
        self.memory_mb = memory_mb
        self.databases = databases
        self.files = Files(in_ram, on_disk)
        self.processes: dict[int, SimProcess] = {}
        self.qemus: dict[int, SimQemu] = {}
        self.passts: dict[int, SimPasst] = {}
        self.on_the_way: dict[str, trio.abc.Stream] = {}
        """Connections that a daemon is passing to a hypervisor, by the id of the VM."""
        self.virtiofsds: dict[int, SimVirtiofsd] = {}
        self.inherited: dict[int, SimListener] = {}
        """Listeners that a daemon has opened for a process that it starts, by their descriptors."""
        self.clock_offset = timedelta()
        """The offset that an operator has set the wall clock by."""
        self.disk_full = False
        self.has_new_agents = False
        """Whether no guest has an agent of an earlier release."""
        self.links = SimLinks()
        self.registry = SimRegistry()
        self.groups: dict[str, int] = {}
        """Control groups by name, each with the process in it."""
        self.changed = trio.Event()
        """Set, and replaced, when a process starts."""
        self._booted_at = trio.current_time()
        self._boots = 0
        self._ids = 0
        self.boot_id = ""
        self.power_on()

    def power_on(self) -> None:
        self._boots += 1
        self.boot_id = f"{self._boots:08d}-0000-4000-8000-{self.rng.getrandbits(48):012x}"
        self._booted_at = trio.current_time()

    def power_cut(self) -> None:
        """Ends all processes, and loses all writes that have not reached a disk."""
        for process in self.living():
            process.end(-signal.SIGKILL)
        self.processes.clear()
        self.qemus.clear()
        self.passts.clear()
        self.virtiofsds.clear()
        self.groups.clear()
        self.files.power_cut()
        self.links.power_cut()
        self.power_on()

    def living(self) -> list[SimProcess]:
        return [process for process in self.processes.values() if process.alive]

    def running(self) -> list[SimQemu]:
        """Returns the hypervisors whose process has not ended."""
        return [qemu for qemu in self.qemus.values() if qemu.process.alive]

    def remove_empty_groups(self) -> None:
        living = {process.identity.pid for process in self.living()}
        self.groups = {name: pid for name, pid in self.groups.items() if pid in living}

    # Clocks and names

    def wall_clock(self) -> datetime:
        return _EPOCH + timedelta(seconds=trio.current_time()) + self.clock_offset

    def wall_clock_ns(self) -> int:
        return int(self.wall_clock().timestamp() * 1e9)

    def new_id(self) -> str:
        self._ids += 1
        return f"{self._ids:08x}{self.rng.getrandbits(96):024x}"

    # Processes

    def spawn(self, argv: list[str], tag: str, cwd: Path, output: Path) -> ProcessIdentity:
        process = self._new_process(argv, tag)
        if argv[0].endswith("virtiofsd"):
            listener = self.inherited.pop(int(argv[argv.index("--fd") + 1]))
            virtiofsd = SimVirtiofsd(self.rng, self.files, process, listener, output)
            self.virtiofsds[process.identity.pid] = virtiofsd
            self.nursery.start_soon(virtiofsd.run)
            return process.identity
        qemu = self.qemus[process.identity.pid] = SimQemu(self, process, argv, cwd, output)
        self.nursery.start_soon(qemu.run)
        self.changed.set()
        self.changed = trio.Event()
        return process.identity

    def spawn_passt(self, argv: list[str]) -> None:
        """Starts passt in the background; it listens when this returns."""
        process = self._new_process(argv, argv[argv.index("--hostname") + 1])
        passt = self.passts[process.identity.pid] = SimPasst(self, process, argv)
        self.nursery.start_soon(passt.run)

    def _new_process(self, argv: list[str], tag: str) -> SimProcess:
        # Few pids, so that one is reused while a daemon still remembers its last process.
        free = [pid for pid in range(2, 400) if pid not in self.processes or not self.processes[pid].alive]
        pid = self.rng.choice(free)
        self.qemus.pop(pid, None)
        self.passts.pop(pid, None)
        self.virtiofsds.pop(pid, None)
        start_time = int((trio.current_time() - self._booted_at) * _TICKS_PER_S)
        identity = ProcessIdentity(pid=pid, start_time=start_time, boot_id=self.boot_id, tag=tag)
        process = self.processes[pid] = SimProcess(identity, argv)
        return process

    def signal(self, process: SimProcess, signum: int) -> None:
        """Ends a process with a signal, now or after its `stubborn_s`."""
        process.signals.append(signum)
        if signum == signal.SIGKILL and process.identity.pid in self.qemus:
            # From now on it executes nothing, however long the kernel takes to end it.
            self.qemus[process.identity.pid].freeze()
        self.nursery.start_soon(self._die, process, signum)

    async def _die(self, process: SimProcess, signum: int) -> None:
        await trio.sleep(self.rng.uniform(0.0, 0.01) + process.stubborn_s)
        process.end(-signum)
