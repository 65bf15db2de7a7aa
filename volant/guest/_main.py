"""The agent's main program, in the process that PID 1 has forked."""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import select
import signal
import threading
import time

from volant.model import agent

from ._server import Server
from ._system import GRACE_FILE, WORKLOAD_FILE, read_text, say
from ._transport import listen_on_vsock, serve_serial_port
from ._watch import Wakeup, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_STACK_BYTES = 256 * 1024
_LAST_WORDS_S = 3.0
_FIRST_ANSWER_S = 3.0
_QUIET_S = 0.2
_QUIET_AT_MOST_S = 1.0
_OOM_SCORE = "-900"


def main(ready: int = -1, set_up: int = -1) -> NoReturn:
    """Serves until PID 1 sends SIGTERM, then stops the workload and exits.

    :param ready: a pipe to PID 1, closed once the first requests were answered, or none arrived
    :param set_up: a pipe that PID 1 closes once the guest is set up
    """
    # A handler and not a blocked signal: programs that the agent starts would inherit the mask and ignore SIGTERM.
    end = Wakeup()
    signal.signal(signal.SIGTERM, lambda number, frame: end.wake())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    threading.stack_size(_STACK_BYTES)
    _protect()
    server = Server(_begin_shutdown)
    server.workload.leader_changed = _note_workload
    if set_up >= 0:
        server.set_up.clear()
    if listen_on_vsock(server.serve):
        _say_listening()
    else:
        serve_serial_port(server.serve, _say_listening)
    server.answered.wait(_FIRST_ANSWER_S)
    # The first request is the daemon's own. A client waits for the one behind it, and there may be one CPU.
    server.wait_for_quiet(_QUIET_S, _QUIET_AT_MOST_S)
    if ready >= 0:
        os.close(ready)
    if set_up >= 0 and _is_set_up(set_up, end.fd):
        server.set_up.set()
    _warm_up()
    while not poll({end.fd: select.POLLIN}):
        pass
    server.workload.stop(_grace())
    server.output.finish(_LAST_WORDS_S)
    os._exit(0)


def _say_listening() -> None:
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    say(f"the agent listens, {uptime:.3f} s after the kernel's start")


def _is_set_up(pipe: int, end: int) -> bool:
    """Waits until PID 1 has closed its end of a pipe, and returns True; False once `end` is readable.

    There is no deadline. On a busy host the setup takes long, and a clone that gets its identity before the end of it
    may lose it again.
    """
    found = poll({pipe: select.POLLIN, end: select.POLLIN})
    os.close(pipe)
    return pipe in found


def _protect() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as handle:
            handle.write(_OOM_SCORE)
    except OSError:
        pass


def _warm_up() -> None:
    """Imports modules for the first command, while no request waits."""
    from . import _exec, _relay

    del _exec, _relay
    import subprocess

    del subprocess


def _begin_shutdown(grace_s: float) -> None:
    with open(GRACE_FILE, "w") as handle:
        handle.write(f"{grace_s}\n")
    os.kill(1, signal.SIGUSR2)


def _note_workload(leader: int | None) -> None:
    """Records the workload's session for PID 1."""
    with open(WORKLOAD_FILE, "w") as handle:
        handle.write("" if leader is None else f"{leader}\n")


def _grace() -> float:
    try:
        return float(read_text(GRACE_FILE))
    except ValueError:
        return agent.DEFAULT_GRACE_S
