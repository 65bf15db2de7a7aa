"""Bounds how long tests wait for programs that they start, how long such programs live, and what they may read."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, AnyStr

ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Before a command: the kernel kills it once the thread that started it is gone, also when the tests are killed."""
READS_ALL = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""Options of `setpriv` for a user that can read this repository although it may be in a directory of root's."""


@contextmanager
def killed_after(seconds: float, process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kills a process if the block takes longer, which ends a read of its output that would block forever."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def read_line(process: subprocess.Popen[AnyStr], within_s: float = 30.0) -> AnyStr:
    """Returns the next line that a program prints.

    :param within_s: then the program is killed
    :raises AssertionError: it has not printed a line within that time, or has ended
    """
    assert process.stdout is not None
    with killed_after(within_s, process):
        line = process.stdout.readline()
    assert line, f"{process.args!r} printed nothing within {within_s:g} s, or has ended"
    return line
