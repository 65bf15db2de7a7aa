"""The facet for the machine as a whole: its memory and its load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from ._disk import Disk

# The file of the reading thread, because only the main thread certainly stays in the daemon's own namespace.
_INTERFACES = Path("/proc/thread-self/net/dev")
_CLOCK = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")


class HostFigures(msgspec.Struct, frozen=True):
    """The load of the machine."""

    cpu_percent: float  #: busy share of all CPUs, 0 to 100, since the previous call (since boot in the first one)
    memory_total_mb: int
    memory_available_mb: int


_PRESSURE_FILE = Path("/proc/pressure/memory")
_PRESSURE = 0.1
"""Programs that wait for memory during this share of the time are slowed down noticeably."""
_LITTLE = 4
"""The machine does not lack memory if this part of it, a quarter, is available."""


class Machine(Protocol):
    def figures(self) -> HostFigures:
        """Returns the load of the machine. For one caller: the CPU figure counts from the previous call."""

    def memory_total_mb(self) -> int:
        """Returns the machine's memory in MiB."""

    def memory_available_mb(self) -> int:
        """Returns the memory in MiB that is available to programs without swapping."""

    def memory_pressure(self) -> float:
        """Returns the share of the last ten seconds in which a program waited for memory; 0 if unknown."""

    def is_short_of_memory(self) -> bool:
        """Returns whether programs wait because the machine lacks memory. A control group at its own limit has the same
        effect on the kernel's figure, so that figure alone does not count. Raises OSError."""
        waits = self.memory_pressure() > _PRESSURE
        return waits and self.memory_available_mb() < self.memory_total_mb() // _LITTLE

    def spare_memory_mb(self, directory: Path) -> int:
        """Returns `memory_available_mb` minus the possible growth of files in a directory in RAM."""

    def file_room_mb(self, directory: Path) -> int:
        """Returns the MiB that a new file may take up in a directory in RAM, which need not exist. Raises OSError."""

    def interface_bytes(self) -> Mapping[str, tuple[int, int]]:
        """Returns the bytes that each network interface of this network namespace has received and sent."""

    def tsc_khz(self) -> int:
        """Returns the rate of the CPU's time stamp counter in kHz if the kernel uses it as its clock, which means that
        it runs at one rate on all CPUs; otherwise 0."""


class LinuxMachine(Machine):
    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._cpu_before = (0, 0)

    def figures(self) -> HostFigures:
        with Path("/proc/stat").open() as file:
            ticks = [int(figure) for figure in file.readline().split()[1:9]]
        total, idle = sum(ticks), ticks[3] + ticks[4]
        total_before, idle_before = self._cpu_before
        self._cpu_before = (total, idle)
        passed = total - total_before
        busy = 100.0 * (1.0 - (idle - idle_before) / passed) if passed > 0 else 0.0
        return HostFigures(
            cpu_percent=round(min(100.0, max(0.0, busy)), 1),
            memory_total_mb=self.memory_total_mb(),
            memory_available_mb=self.memory_available_mb(),
        )

    def memory_total_mb(self) -> int:
        return _meminfo("MemTotal") // 1024

    def memory_available_mb(self) -> int:
        return _meminfo("MemAvailable") // 1024

    def memory_pressure(self) -> float:
        try:
            # "some avg10=1.23 avg60=…", in percent; kernels without pressure stall information have no such file.
            return float(_PRESSURE_FILE.read_text().split("avg10=")[1].split()[0]) / 100
        except (OSError, IndexError, ValueError):
            return 0.0

    def spare_memory_mb(self, directory: Path) -> int:
        return max(0, self.memory_available_mb() - self._disk.unbacked(directory) // 2**20)

    def file_room_mb(self, directory: Path) -> int:
        existing = directory if directory.exists() else directory.parent
        free_mb = (self._disk.free(existing) - self._disk.unbacked(directory)) // 2**20
        return max(0, min(free_mb, self.spare_memory_mb(directory)))

    def interface_bytes(self) -> Mapping[str, tuple[int, int]]:
        found = {}
        for line in _INTERFACES.read_text().splitlines()[2:]:
            name, _, rest = line.partition(":")
            figures = rest.split()
            found[name.strip()] = int(figures[0]), int(figures[8])
        return found

    def tsc_khz(self) -> int:
        try:
            if _CLOCK.read_text().strip() != "tsc":
                return 0
            with Path("/proc/cpuinfo").open() as lines:
                # The kernel derives this figure from the counter's rate: it is twice the MHz, to 5 kHz.
                bogomips = next(line.partition(":")[2] for line in lines if line.startswith("bogomips"))
            return round(float(bogomips) * 500)
        except (OSError, StopIteration, ValueError):
            return 0


def _meminfo(field: str) -> int:
    """Returns a field of /proc/meminfo in KiB, 0 if it is missing."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0])
    return 0
