"""The shell on the serial console, for people.

The console is also the log of a boot, so nothing is written to it without a request: a process of some kilobytes waits
for a first line, and becomes a shell that runs it. Rejected: a shell from the start, like a getty. Its prompt would be
an unfinished line in every VM's log, and it would cost every VM memory for the few consoles that are used.

The shell is the root filesystem's, otherwise BusyBox's. A user with access to the console already is root through
`exec`.
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
"""More starts within this time mean that there is no usable terminal."""
_WAIT = """
read -r line || exit 1
[ -f "$2" ] && read -r state < "$2"
first='eval "$1"; exec sh -l'
[ "$state" = mounted ] && [ -x "$1/bin/sh" ] && exec chroot "$1" /bin/sh -lc "$first" sh "$line"
cd; exec sh -lc "$first" sh "$line"
"""


class Console:
    """The process on the serial console, a child of PID 1."""

    def __init__(self, busybox: str, root: str, state_file: str, say: Callable[[str], None]) -> None:
        self.pid = 0
        """The process id; 0 if there is no process."""
        self._busybox = busybox
        # A session of its own on the terminal itself, for Ctrl-C and jobs: /dev/console can't be a controlling one.
        self._command = ["busybox", "setsid", "busybox", "cttyhack", "sh", "-c", _WAIT, "sh", root, state_file]
        self._say = say
        self._starts: list[float] = []

    def start(self) -> None:
        """Starts the process that waits for a first line, also after the end of a shell."""
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
        """Sends SIGHUP, like a closed terminal: an interactive shell ignores SIGTERM."""
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGHUP)
            except ProcessLookupError:
                pass
