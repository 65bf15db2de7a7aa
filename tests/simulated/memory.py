"""The memory of the simulated machine and of its hypervisors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import trio

from actors import fault
from volant.host import Disk, HostFigures, Machine as MachineFacet, MemoryUsage, Processes, ProcessGone, ProcessMemory
from volant.model import ProcessIdentity

from .calls import Calls
from .file_system import File

_QEMU_KB = 40 * 1024
"""Of a hypervisor, beside its guest's memory."""
_OWN_SHARE = 8
"""A guest has written to an eighth of its memory."""


class SimMachine(MachineFacet):
    def __init__(self, calls: Calls, disk: Disk) -> None:
        self._calls = calls
        self._disk = disk

    def figures(self) -> HostFigures:
        return HostFigures(0.0, self.memory_total_mb(), self.memory_available_mb())

    def memory_total_mb(self) -> int:
        return self._calls.machine.memory_mb

    def memory_available_mb(self) -> int:
        self._calls.check()
        machine = self._calls.machine
        used = sum((qemu.ram_in_use() or File()).size for qemu in machine.running()) // 2**20
        return 0 if fault("memory.is_short") else machine.memory_mb - used

    def memory_pressure(self) -> float:
        return 0.0

    def is_short_of_memory(self) -> bool:
        self._calls.check()
        return fault("memory.is_under_pressure")

    def interface_bytes(self) -> Mapping[str, tuple[int, int]]:
        return {}

    def spare_memory_mb(self, directory: Path) -> int:
        return max(0, self.memory_available_mb())

    def file_room_mb(self, directory: Path) -> int:
        return max(0, min(self._disk.free(directory) // 2**20, self.spare_memory_mb(directory)))

    def tsc_khz(self) -> int:
        return 2_600_000


class SimProcessMemory(ProcessMemory):
    def __init__(self, calls: Calls, processes: Processes) -> None:
        self._calls = calls
        self._files = calls.machine.files
        self._processes = processes

    async def usage(self, identity: ProcessIdentity, timeout_s: float) -> MemoryUsage:
        with self._processes.open(identity) as process:
            await trio.sleep(self._calls.rng.uniform(0.0, 0.01))
            if process.exited:
                raise ProcessGone(f"process {identity.pid} has ended")
            ram = self._calls.machine.qemus[identity.pid].ram_in_use()
            taken = _QEMU_KB + (0 if ram is None else ram.size // 1024)
            return MemoryUsage(rss_kb=taken, pss_kb=taken, private_kb=taken, shared_kb=0)

    async def copy_mapped_file(self, identity: ProcessIdentity, size: int, target: Path, mode: int = 0o600) -> None:
        def copy() -> None:
            self._calls.check_space(target)
            self._check_mapping(identity)
            self._files.put(target, File(size=size))

        await self._calls.run(copy)

    async def copy_own_pages(self, identity: ProcessIdentity, size: int, target: Path) -> int:
        def copy() -> int:
            self._calls.check_space(target)
            self._check_mapping(identity)
            self._files.file(target)
            return size // _OWN_SHARE

        return await self._calls.run(copy)

    def _check_mapping(self, identity: ProcessIdentity) -> None:
        with self._processes.open(identity) as process:
            if process.exited or not self._calls.machine.qemus[identity.pid].waits_for_state:
                raise ProcessGone(f"process {identity.pid} has no private mapping")
