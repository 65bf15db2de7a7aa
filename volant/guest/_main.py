"""The agent's main program, in the process that PID 1 has forked."""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import select
import signal
import threading
import time

from ._server import Server
from ._transport import listen_on_vsock, serve_serial_port
from ._watch import Bell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

GRACE_FILE = "/run/volant/grace"
_STACK_BYTES = 256 * 1024
_LAST_WORDS_S = 3.0
_FIRST_ANSWER_S = 3.0
_QUIET_S = 0.2
_QUIET_AT_MOST_S = 1.0
_SET_UP_MS = 10_000
_OOM_SCORE = "-900"


def main(tell_ready: int = -1, set_up: int = -1) -> NoReturn:
    """Serve until PID 1 sends SIGTERM; then see the workload out, and end.

    :param tell_ready: closed when the first requests have been answered, or when none comes
    :param set_up: closed at its other end when PID 1 has done what it does only then
    """
    # A handler and no blocked signal: what the agent starts would inherit the mask, and be deaf to SIGTERM too.
    end = Bell()
    signal.signal(signal.SIGTERM, lambda number, frame: end.ring())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    threading.stack_size(_STACK_BYTES)
    _protect()
    server = Server(_begin_shutdown)
    if set_up >= 0:
        server.set_up.clear()
    if listen_on_vsock(server.serve):
        _say_listening()
    else:
        serve_serial_port(server.serve, _say_listening)
    server.answered.wait(_FIRST_ANSWER_S)
    # The first is the daemon's own; the one behind it is what somebody waits for, and there may be one CPU.
    server.wait_for_quiet(_QUIET_S, _QUIET_AT_MOST_S)
    if tell_ready >= 0:
        os.close(tell_ready)
    if set_up >= 0:
        _wait_for_end_of(set_up)
        server.set_up.set()
    _warm_up()
    poll = select.poll()
    poll.register(end.fd, select.POLLIN)
    while not poll.poll():
        pass
    server.workload.stop(_grace())
    server.output.finish(_LAST_WORDS_S)
    os._exit(0)


def _say_listening() -> None:
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    os.write(2, f"volant: the agent listens, {uptime:.3f} s after the kernel's start\n".encode())


def _wait_for_end_of(pipe: int) -> None:
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.poll(_SET_UP_MS)
    os.close(pipe)


def _protect() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as handle:
            handle.write(_OOM_SCORE)
    except OSError:
        pass


def _warm_up() -> None:
    """Import what the first command needs, now that nobody waits for it."""
    from . import _exec, _relay

    del _exec, _relay
    import subprocess

    del subprocess


def _begin_shutdown(grace_s: float) -> None:
    with open(GRACE_FILE, "w") as handle:
        handle.write(f"{grace_s}\n")
    os.kill(1, signal.SIGUSR2)


def _grace() -> float:
    try:
        with open(GRACE_FILE) as handle:
            return float(handle.read(64))
    except (OSError, ValueError):
        return 10.0
