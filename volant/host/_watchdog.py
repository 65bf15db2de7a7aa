"""The watchdog of a host: a process that freezes VMs when their time expires without a renewal by the daemon.

It is a separate program that only uses the standard library, so that it needs little memory, starts at once and is
independent of the daemon: `python -I -S _watchdog.py FILE GROUP TAG READY`. FILE is shared memory with the time until
which the VMs may run, by CLOCK_BOOTTIME (`Deadline`). GROUP is the directory of a cgroup (version 2) that holds the
VMs: freezing it stops all of its processes, and those that are put into it later. Only the daemon thaws it, after it
has written another time and asked etcd. TAG identifies the process. READY is the number of a descriptor that it writes
to when it watches. It ends when the group is removed.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time
from pathlib import Path

SIZE = 16
"""Size of the shared memory: it contains the time twice, so that a reader detects a write in progress."""
LOCKED = 3
"""Exit status when another watchdog has the file."""
_LONGEST_S = 0.1
_MCL_CURRENT, _MCL_FUTURE = 1, 2


class Deadline:
    """A time in shared memory; 0 if the VMs may not run."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        """Opens the shared memory. :raises OSError: the file can't be opened."""
        flags = os.O_RDWR | os.O_CREAT if write else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if write:
                os.truncate(descriptor, SIZE)
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            self._memory = mmap.mmap(descriptor, SIZE, access=access)
        finally:
            os.close(descriptor)

    def set(self, at: float) -> None:
        """Lets the VMs run until this time, by CLOCK_BOOTTIME in seconds."""
        one = struct.pack("<d", at)
        self._memory[:8] = one
        self._memory[8:] = one

    def get(self) -> float:
        """Returns the time; 0 during a write, which a stopped daemon may have left unfinished."""
        first, second = struct.unpack("<dd", self._memory[:])
        return float(first) if first == second else 0.0


def boottime() -> float:
    """Returns the seconds since the host was booted, including its sleep. This clock can't be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def main() -> int:
    """Watches until the group is removed. Returns `LOCKED` if another watchdog has the file."""
    shared, group, ready = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
    # It stays open, as whoever finds this process sees by it which file it watches.
    lock = os.open(shared, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return LOCKED
    deadline = Deadline(shared)
    freeze = os.open(group / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
    _be_first()
    os.write(ready, b"watching\n")
    os.close(ready)
    while _is_there(freeze):
        left_s = deadline.get() - boottime()
        if left_s <= 0:
            try:
                os.write(freeze, b"1")
            except OSError:
                # The group was removed just now, or the kernel tries again next time.
                left_s = _LONGEST_S
        time.sleep(min(_LONGEST_S, left_s) if left_s > 0 else _LONGEST_S)
    return 0


def _is_there(freeze: int) -> bool:
    """Returns whether this group exists, and not another one created in its place."""
    try:
        os.pread(freeze, 2, 0)
    except OSError:
        return False
    return True


def _be_first() -> None:
    """Requests a priority above all VMs, and memory that is never written to a disk; continues without them."""
    ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        pass


if __name__ == "__main__":
    sys.exit(main())
