"""Notes from outside of all hosts which incarnation of each VM runs: what a hypervisor's vCPU has done since the last
look, whatever its host says of it. So it sees through partitions, and through daemons that are frozen or dead.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

_EVERY_S = 0.25
_NAME = re.compile(rb"volant\.hostname=([a-z0-9-]+)")
"""On the guest's kernel command line, which is an argument of its hypervisor."""


class Incarnation(NamedTuple):
    """A process that is, or was, a VM."""

    name: str
    """Of its VM, which no other VM of the test ever has."""
    host: str
    vm_id: int
    pid: int
    began: int
    """When the process began, in the kernel's ticks, as pids are used again."""


class Seen:
    """When an incarnation ran."""

    def __init__(self, at: float, done: int) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.looked = at
        self.done = done


class Recorder:
    """Looks at all hypervisors that work in a directory, `DIRECTORY/HOST/run/vms/ID`, in a thread of its own."""

    def __init__(self, directory: Path) -> None:
        self._way = re.compile(re.escape(str(directory)) + r"/([a-z0-9]+)/run/vms/(\d+)(?: \(deleted\))?")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self.seen: dict[Incarnation, Seen] = {}

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopped.set()
        self._thread.join()

    def running(self, within_s: float = 2.0) -> list[Incarnation]:
        """Returns the incarnations that ran just now. The vCPU of an idle guest wakes up at least once a second."""
        now = time.monotonic()
        return [each for each, seen in list(self.seen.items()) if seen.last is not None and seen.last > now - within_s]

    def moved(self) -> set[str]:
        """Returns the names of VMs that have run on more than one host."""
        hosts: dict[str, set[str]] = {}
        for each, seen in self.seen.items():
            if seen.first is not None:
                hosts.setdefault(each.name, set()).add(each.host)
        return {name for name, on in hosts.items() if len(on) > 1}

    def twice(self) -> list[str]:
        """Returns where an incarnation of a VM ran after another one of it had begun to run."""
        found = []
        by_vm: dict[str, list[tuple[Incarnation, Seen]]] = {}
        for each, seen in self.seen.items():
            if seen.first is not None:
                by_vm.setdefault(each.name, []).append((each, seen))
        for vm, ran in by_vm.items():
            ran.sort(key=lambda pair: pair[1].first or 0.0)
            for (one, before), (other, after) in pairwise(ran):
                assert before.last is not None
                assert after.first is not None
                if before.last > after.first:
                    found.append(f"{vm}: {one} ran {before.last - after.first:.2f} s longer than until {other} did")
        return found

    def _keep(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            for each, done in self._look():
                now = time.monotonic()
                seen = self.seen.get(each)
                if seen is None:
                    self.seen[each] = Seen(now, done)
                elif done != seen.done:
                    # It ran some time since the last look, surely not before that.
                    seen.first = seen.first if seen.first is not None else now
                    seen.last = seen.looked
                    seen.done = done
                    seen.looked = now
                else:
                    seen.looked = now

    def _look(self) -> Iterator[tuple[Incarnation, int]]:
        """Yields the hypervisors of VMs that exist now, with what their vCPUs have done."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                found = self._way.fullmatch(str((entry / "cwd").readlink()))
                if found is None:
                    continue
                name = _NAME.search((entry / "cmdline").read_bytes())
                began = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
                done = sum(_turns(task) for task in (entry / "task").iterdir())
            except (OSError, IndexError):
                continue
            if done and name is not None:
                yield Incarnation(name[1].decode(), found[1], int(found[2]), int(entry.name), began), done


def _turns(task: Path) -> int:
    """Returns how long a thread has run, in nanoseconds, if it is a vCPU."""
    return int((task / "schedstat").read_text().split()[0]) if (task / "comm").read_text().startswith("CPU ") else 0
