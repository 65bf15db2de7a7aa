"""Tells the kernel which processes to end first when the host runs out of memory (`oom_score_adj` in proc_pid(5)).

A process that no VM uses is the first to go: a new one, one of the warm pool, the build of a template. One that a VM
uses counts as any other program of the host: there the largest goes first. The daemon's unit puts the daemon behind
them all, and what it starts would inherit that.
"""

from __future__ import annotations

from . import _procfs

SPARE = 1000
"""The kernel ends these first, whatever their size."""
NEVER = -1000
_FILE = "oom_score_adj"


def end_first(pid: int) -> None:
    """Raises OSError."""
    _write(pid, SPARE)


def end_by_size(pid: int) -> None:
    """Raises OSError."""
    own = int((_procfs.PROC / "self" / _FILE).read_text())
    # A daemon without CAP_SYS_RESOURCE can't put a process behind what its own value was at its start.
    _write(pid, max(0, own))


def end_last(pid: int) -> None:
    """As far as this daemon may: without CAP_SYS_RESOURCE, as late as itself. Raises OSError."""
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
