"""`SimHost`: the host of one daemon on the simulated machine."""

from __future__ import annotations

from volant.host import Host, Ownership

from .calls import Calls
from .clock import SimClock, SimRandom, SimThreads
from .files import SimDescriptors, SimDisk, SimFiles, SimWatches
from .limits import SimLimits, SimSandboxAccess
from .machine import Machine
from .memory import SimMachine, SimProcessMemory
from .processes import SimProc, SimProcesses
from .sockets import SimSockets


class SimHost(Host):
    """Composes the simulated facets; each implements a protocol of `volant.host` on its own."""

    def __init__(self, machine: Machine) -> None:
        self.calls = Calls(machine)
        self.own = Ownership()
        self.clock = SimClock(machine)
        self.random = SimRandom(machine)
        self.threads = SimThreads(self.calls)
        self.processes = SimProcesses(self.calls, self.own)
        self.proc = SimProc(self.calls, self.processes, self.own)
        self.process_memory = SimProcessMemory(self.calls, self.processes)
        self.limits = SimLimits(self.calls)
        self.sandbox = SimSandboxAccess()
        self.files = SimFiles(self.calls, self.own)
        self.descriptors = SimDescriptors(self.calls)
        self.disk = SimDisk(self.calls)
        self.machine = SimMachine(self.calls, self.disk)
        self.watches = SimWatches(self.calls)
        self.sockets = self._sockets = SimSockets(self.calls)

    def die(self) -> None:
        """The daemon was killed: the kernel closes what it had open."""
        self.calls.alive = False
        self.calls.machine.files.forget_descriptors()
        self._sockets.close_all()
