"""The kernel's priorities of processes, for processor time and for memory shortage.

`nice` is not enough: the kernel first shares processors among sessions (autogroups, see sched(7)), and each hypervisor
has its own session. So these functions set the weight of a session, as a nice value in `/proc/PID/autogroup`. It has no
effect in a control group with the cpu controller, where the groups' weights count.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import _procfs

# Tells the kernel which processes to end first when the host runs out of memory (`oom_score_adj` in proc_pid(5)).
#
# A process that no VM uses is the first to go: a new one, one of the warm pool, the build of a template. One that a VM
# uses counts as any other program of the host: there the largest goes first. The daemon's unit puts the daemon behind
# them all, and what it starts would inherit that.


SPARE = 1000
"""The score of processes that the kernel ends first, whatever their size."""
NEVER = -1000
_FILE = "oom_score_adj"


def end_first(pid: int) -> None:
    """Makes the kernel end a process first. Raises OSError."""
    _write(pid, SPARE)


def end_by_size(pid: int) -> None:
    """Makes the kernel rank a process by its size. Raises OSError."""
    own = int((_procfs.PROC / "self" / _FILE).read_text())
    # A daemon without CAP_SYS_RESOURCE can't put a process behind what its own value was at its start.
    _write(pid, max(0, own))


def end_last(pid: int) -> None:
    """Makes the kernel end a process last, as far as the daemon may: without CAP_SYS_RESOURCE, as late as the daemon.
    Raises OSError."""
    try:
        _write(pid, NEVER)
    except PermissionError:
        _write(pid, int((_procfs.PROC / "self" / _FILE).read_text()))


def _write(pid: int, score: int) -> None:
    path = _procfs.PROC / str(pid) / _FILE
    try:
        with _procfs.as_user_of(pid):
            path.write_text(str(score))
    except PermissionError:
        # The file of a process that may not be inspected is root's.
        path.write_text(str(score))


OWN = -15
"""The nice value of the daemon's session: twenty-eight times the weight of any other session."""
LOWERED = 10
"""The nice value of hypervisors' sessions: a ninth of the weight of any other session."""


def raise_own() -> bool:
    """Raises the weight of this process's session above hypervisors', and returns whether that worked.

    Not for a session that another process leads, such as a terminal's: it has other programs.
    """
    try:
        if os.getsid(0) != os.getpid():
            return False
        Path("/proc/self/autogroup").write_text(str(OWN))
    except OSError:
        return False
    return True


def lower(pid: int) -> None:
    """Lowers the weight of a process's session below others'.

    Raises BlockingIOError if the kernel wants a retry later, as it only accepts a few changes per second; OSError.
    """
    Path(f"/proc/{pid}/autogroup").write_text(str(LOWERED))
