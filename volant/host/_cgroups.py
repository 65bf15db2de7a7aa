"""Limits processes with control groups of version 2.

If the host runs systemd, systemd manages the groups, and the daemon requests a scope (`_scopes.py`). Otherwise the
daemon itself creates a group for each hypervisor, next to its own, as a group with processes in it can't limit groups
below it. A limit is set if the kernel and the operator have given its controller to the daemon.

A group is removed once its last process has ended. Each call that creates or removes a group also removes all other
empty groups, such as those of a killed daemon.
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
"""Maximum wait for a process that exits, which takes some 5 ms, more on a busy host."""
MOVABLE, FROZEN = "-movable", "vms"
"""Names of directories of groups: `volant-INSTANCE-movable/vms` is frozen as a whole, with all groups in it."""
ALL_WEIGHT = 20
"""The CPU weight of all hypervisors together. The daemon has 100, as otherwise it would wait for a processor while
guests are busy."""


class ResourceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a process."""

    memory_mb: int
    cpus: int
    """Seconds of processor time per second."""
    weight: int
    """Its share of a busy processor or disk; 100 is the default of all processes."""
    tasks: int


@dataclass(frozen=True)
class Cgroups:
    """Creates control groups in a directory."""

    directory: Path
    stays: bool = False
    """Whether the directory is neither created nor removed here."""
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)
    """Prevents one thread from removing the empty group that another thread is about to fill."""

    def enclose(self, pid: int, name: str, limits: ResourceLimits | None) -> None:
        """Moves a process into a separate group, with `limits` as far as the kernel supports them. An existing group is
        kept. Raises OSError."""
        group = self.directory / name
        with self._lock:
            if not is_in(group, pid):
                self._make(group)
                move(pid, group)
            if limits is not None:
                limit(group, limits)

    def _make(self, group: Path) -> None:
        if not self.stays:
            self.directory.mkdir(exist_ok=True)
        enable_controllers(self.directory.parent)
        enable_controllers(self.directory)
        with suppress(OSError):
            (self.directory / "cpu.weight").write_text(str(ALL_WEIGHT))
        self._sweep()
        group.mkdir(exist_ok=True)

    def remove_empty(self, ended: str | None = None) -> None:
        """Removes the groups of processes that have ended, and the directory with the last one.

        `ended` names a group whose process is exiting. Its end is awaited, up to `_EXIT_S` seconds: an exiting process
        loses its command line, by which it is found, some milliseconds before it leaves its group.
        """
        deadline = time.monotonic() + _EXIT_S
        while True:
            with self._lock:
                self._sweep()
                if not self.stays:
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
                # The kernel refuses while there is a process in it.
                with suppress(OSError):
                    group.rmdir()


def is_in(group: Path, pid: int) -> bool:
    """Returns whether a process is in a group itself, not in one below it. Raises OSError."""
    try:
        return str(pid) in (group / "cgroup.procs").read_text().split()
    except FileNotFoundError:
        return False


def move(pid: int, group: Path) -> None:
    """Moves a process into a group. It takes the kernel ten milliseconds, during which no process of the host can start
    or end. Raises OSError."""
    (group / "cgroup.procs").write_text(str(pid))


def limit(group: Path, limits: ResourceLimits) -> None:
    """Sets the limits that the kernel supports. Raises OSError."""
    for file, value in _values(limits).items():
        if (group / file).exists():
            (group / file).write_text(value)


def enable_controllers(directory: Path) -> None:
    """Enables all available controllers in the groups below a directory."""
    for controller in _CONTROLLERS:
        # One by one, as a missing controller would fail the others.
        with suppress(OSError):
            (directory / "cgroup.subtree_control").write_text(f"+{controller}")


def _values(limits: ResourceLimits) -> dict[str, str]:
    return {
        "memory.max": str(limits.memory_mb * 2**20),
        "cpu.max": f"{limits.cpus * _PERIOD_US} {_PERIOD_US}",
        "cpu.weight": str(limits.weight),
        "io.weight": f"default {limits.weight}",
        "pids.max": str(limits.tasks),
    }


def is_frozen_as_a_whole(directory: Path) -> bool:
    """Returns whether a directory contains the groups of processes that are frozen together (`_freezer.py`)."""
    return directory.name == FROZEN and directory.parent.name.removesuffix(".scope").endswith(MOVABLE)


def is_frozen(group: Path) -> bool:
    """Returns whether a group is frozen, with all its present and future processes. False if there is no such group."""
    try:
        return "frozen 1" in (group / "cgroup.events").read_text().splitlines()
    except OSError:
        return False


def is_to_freeze(group: Path) -> bool:
    """Returns whether a group is frozen or about to be. False if there is no such group."""
    try:
        return (group / "cgroup.freeze").read_text().strip() == "1"
    except OSError:
        return False


def mount_of(mountinfo: str) -> tuple[Path, str] | None:
    """Returns the mount point of the version 2 hierarchy, and the group that is mounted there. See
    proc_pid_mountinfo(5)."""
    found: list[tuple[Path, str]] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5:
            continue
        place = Path(fields[4].encode().decode("unicode_escape"))
        # It hides what was mounted there before.
        found = [(other, group) for other, group in found if not other.is_relative_to(place)]
        if after.split()[:1] == ["cgroup2"]:
            found.append((place, fields[3]))
    return found[0] if found else None


def group_of(pid: int) -> Path | None:
    """Returns the directory of a process's group; None if it is not visible. Raises OSError."""
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
    """Returns the contents of a group's limit files."""
    found = {}
    for name in _FILES:
        with suppress(OSError):
            found[name] = (group / name).read_text().strip()
    return found


def events_of(group: Path) -> Path | None:
    """Returns the file that changes when the kernel kills a process of the group for lack of memory."""
    path = group / _EVENTS
    return path if path.exists() else None


def oom_kills(events: str) -> int:
    """Returns the number of killed processes, from the content of that file."""
    for line in events.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return 0


def own_cgroups(name: str) -> Cgroups | None:
    """Returns the place for groups without systemd; None if there is none. `name` is unique to this daemon."""
    if Path("/run/systemd/system").exists():
        # systemd kills what it does not know of.
        return None
    try:
        found = mount_of(Path("/proc/self/mountinfo").read_text(errors="replace"))
        if found is None:
            return None
        groups = Cgroups(found[0] / name)
        groups.directory.mkdir(exist_ok=True)
        # Empty groups of the daemon before this one.
        groups.remove_empty()
    except OSError:
        return None
    return groups
