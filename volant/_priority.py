"""Who gets a processor first where the daemon and busy guests want one.

`nice` says nothing of that: the kernel first shares processors among sessions (autogroups, see sched(7)), and each
hypervisor leads one of its own. So the weight of a session is set, which is written as a nice value to
`/proc/PID/autogroup`. It counts where processes are in no control group that has processors to share; there the groups'
weights do.
"""

from __future__ import annotations

import os
from pathlib import Path

OWN = -15
"""Twenty-eight times the weight of any other session."""
LOWERED = 10
"""A ninth of the weight of any other session."""


def raise_own() -> bool:
    """Gives this process's session more weight than hypervisors have, if it leads it and may do that; whether it has.

    A session that somebody else leads, as that of a terminal, has other programs that should not have it.
    """
    try:
        if os.getsid(0) != os.getpid():
            return False
        Path("/proc/self/autogroup").write_text(str(OWN))
    except OSError:
        return False
    return True


def lower(pid: int) -> None:
    """Gives the session of a process less weight than others have.

    Raises BlockingIOError when the kernel wants that to be tried again later, as it takes a few of these a second;
    OSError when it can't be.
    """
    Path(f"/proc/{pid}/autogroup").write_text(str(LOWERED))
