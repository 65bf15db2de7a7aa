"""Gives the daemon processor time before busy guests.

`nice` is not enough: the kernel first shares processors among sessions (autogroups, see sched(7)), and each hypervisor
leads a session of its own. So these functions set the weight of a session, as a nice value in `/proc/PID/autogroup`. It
has no effect in a control group with the cpu controller, where the groups' weights count.
"""

from __future__ import annotations

import os
from pathlib import Path

OWN = -15
"""Twenty-eight times the weight of any other session."""
LOWERED = 10
"""A ninth of the weight of any other session."""


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

    Raises BlockingIOError when the kernel wants a retry later, as it takes only a few of these a second; OSError.
    """
    Path(f"/proc/{pid}/autogroup").write_text(str(LOWERED))
