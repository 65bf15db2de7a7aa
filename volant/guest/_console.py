"""The shell on the serial console, for people.

A console is also the log of a boot, so nothing is written to it unasked: a process of some kilobytes waits for a first
line, and becomes a shell that runs it. A shell from the start, as a getty's would be, was rejected: its prompt would
stand in every VM's log as a line that has not ended, and cost memory in all of them for the few that somebody uses.

The shell is that of the root filesystem that the VM was given, if that has one, else BusyBox's, as whatever a VM runs
there are people who must be able to look what is wrong with it. Who reaches the console is root by `exec` already.
"""

from __future__ import annotations

import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_STARTS = 10
_WINDOW_S = 60.0
"""More starts than that in this time, and there is no terminal, or nobody at it who means it."""
_WAIT = """
read -r line || exit 1
[ -f "$2" ] && read -r state < "$2"
first='eval "$1"; exec sh -l'
[ "$state" = mounted ] && [ -x "$1/bin/sh" ] && exec chroot "$1" /bin/sh -lc "$first" sh "$line"
cd; exec sh -lc "$first" sh "$line"
"""


class Console:
    """The process on the serial console. PID 1 has one."""

    def __init__(self, busybox: str, root: str, state_file: str, say: Callable[[str], None]) -> None:
        self.pid = 0
        """0: there is none."""
        self._busybox = busybox
        # A session of its own on the terminal itself, for Ctrl-C and jobs: /dev/console can't be a controlling one.
        self._command = ["busybox", "setsid", "busybox", "cttyhack", "sh", "-c", _WAIT, "sh", root, state_file]
        self._say = say
        self._starts: list[float] = []

    def start(self) -> None:
        """Wait for somebody at the console, again if there was one."""
        self.pid = 0
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < _WINDOW_S]
        if len(self._starts) >= _STARTS:
            self._say("the console has no shell any more: it ended too often")
            return
        self._starts.append(now)
        try:
            environ = {**os.environ, "TERM": "xterm"}
            self.pid = os.posix_spawn(self._busybox, self._command, environ, setsigmask=())
        except OSError as error:
            self._say(f"the console has no shell: {error}")

    def hang_up(self) -> None:
        """End it as a terminal does that goes away: a shell with somebody at it does not listen to SIGTERM."""
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGHUP)
            except ProcessLookupError:
                pass
