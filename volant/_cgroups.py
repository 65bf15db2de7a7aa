"""What a process may take of the machine: control groups of version 2.

Where systemd runs the host it keeps them, and is asked for a scope (`_scopes.py`). Elsewhere the daemon makes a group
for each hypervisor itself, beside its own, as a group with processes in it can't bound groups below it. What bounds
there are depends on the controllers that the kernel and whoever runs the host leave to it; each is set where it is.

A group that has lost its last process is removed by whoever cleans up after that process; and each one that is made or
removed takes those along that were left, as by a daemon that was killed, or of a process that is nobody's any more.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

_CONTROLLERS = ("cpu", "io", "memory", "pids")
_PERIOD_US = 100_000
_FILES = ("memory.max", "cpu.max", "cpu.weight", "io.weight", "pids.max")
_EVENTS = "memory.events"
_EXIT_S, _EXIT_AGAIN_S = 1.0, 0.005
"""Bounds the wait for a process that exits: it takes some 5 ms, more on a busy host."""
ALL_WEIGHT = 20
"""Of all hypervisors together, where the daemon has 100, and everybody else: it would wait for a processor while many
guests are busy."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a process may take."""

    memory_mb: int
    cpus: int
    """Seconds of processors in a second."""
    weight: int
    """Of its share where others want processor or disk, too; 100 is what everybody has."""
    tasks: int


@dataclass(frozen=True)
class Cgroups:
    """Where groups are made."""

    directory: Path
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    """Else a thread that sweeps removes the group that another has made and not filled yet."""

    def enclose(self, pid: int, name: str, bounds: Bounds | None) -> None:
        """Move a process into a group of its own, which is held to `bounds` as far as the kernel can; one that is there
        already stays. Raises OSError."""
        with self._lock:
            self.directory.mkdir(exist_ok=True)
            for group in (self.directory.parent, self.directory):
                for controller in _CONTROLLERS:
                    # One by one, as one that is not there would spoil the others.
                    with suppress(OSError):
                        (group / "cgroup.subtree_control").write_text(f"+{controller}")
            with suppress(OSError):
                (self.directory / "cpu.weight").write_text(str(ALL_WEIGHT))
            self._sweep()
            group = self.directory / name
            group.mkdir(exist_ok=True)
            for file, value in () if bounds is None else _values(bounds).items():
                if (group / file).exists():
                    (group / file).write_text(value)
            (group / "cgroup.procs").write_text(str(pid))

    def remove_empty(self, ended: str | None = None) -> None:
        """Remove the groups of processes that have ended, and the directory with the last one.

        `ended` names a group whose process ends at present. It is waited for, up to `_EXIT_S` seconds: a process that
        exits has no command line any more, by which it would be found, some milliseconds before it leaves its group.
        """
        deadline = time.monotonic() + _EXIT_S
        while True:
            with self._lock:
                self._sweep()
                with suppress(OSError):
                    self.directory.rmdir()
            if ended is None or not (self.directory / ended).exists() or time.monotonic() >= deadline:
                return
            time.sleep(_EXIT_AGAIN_S)

    def _sweep(self) -> None:
        if not self.directory.is_dir():
            return
        for group in self.directory.iterdir():
            if group.is_dir():
                # Refused while there is a process in it.
                with suppress(OSError):
                    group.rmdir()


def _values(bounds: Bounds) -> dict[str, str]:
    return {
        "memory.max": str(bounds.memory_mb * 2**20),
        "cpu.max": f"{bounds.cpus * _PERIOD_US} {_PERIOD_US}",
        "cpu.weight": str(bounds.weight),
        "io.weight": f"default {bounds.weight}",
        "pids.max": str(bounds.tasks),
    }


def mount_of(mountinfo: str) -> tuple[Path, str] | None:
    """Where the hierarchy of version 2 is, and which group of it; None: it is nowhere. See proc_pid_mountinfo(5)."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if after.split()[:1] == ["cgroup2"] and len(fields) >= 5:
            return Path(fields[4].encode().decode("unicode_escape")), fields[3]
    return None


def group_of(pid: int) -> Path | None:
    """The directory of a process's group; None where that can't be seen. Raises OSError."""
    found = mount_of(Path("/proc/self/mountinfo").read_text(errors="replace"))
    if found is None:
        return None
    mounted, root = found
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            path = mounted / line.removeprefix("0::").removeprefix(root).lstrip("/")
            return path if path.is_dir() else None
    return None


def limits_in(group: Path) -> dict[str, str]:
    """What the kernel holds a group to, as it says it."""
    found = {}
    for name in _FILES:
        with suppress(OSError):
            found[name] = (group / name).read_text().strip()
    return found


def events_of(group: Path) -> Path | None:
    """The file that changes when a process of the group is killed as memory is short; None: there is none."""
    path = group / _EVENTS
    return path if path.exists() else None


def killed_in(events: str) -> int:
    """How many that were."""
    for line in events.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return 0


def own_groups(name: str) -> Cgroups | None:
    """Where groups can be made without systemd; None: nowhere. `name` is of this daemon alone."""
    if Path("/run/systemd/system").exists():
        # It kills what it does not know of.
        return None
    try:
        found = mount_of(Path("/proc/self/mountinfo").read_text(errors="replace"))
        if found is None:
            return None
        groups = Cgroups(found[0] / name)
        groups.directory.mkdir(exist_ok=True)
        # Those of a daemon before this one, of which some go on.
        groups.remove_empty()
    except OSError:
        return None
    return groups
