"""The system calls of one daemon on the simulated machine.

Every call takes a little time, before and after its effect, so that a daemon can be killed on either side of it. A
daemon that was killed has no effect any more: its calls raise. In a simulated death `finally` blocks run, as they do
not in a real one, and this keeps them without effect.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from actors import check_fence, fault

from .machine import Machine

T = TypeVar("T")

_LONGEST_S = 0.002


class DaemonDied(Exception):
    """The daemon that makes this call was killed."""


class Calls:
    """Makes the calls of one daemon, while it lives."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.rng = machine.rng
        self.alive = True

    def check(self) -> None:
        """Comes first in a call that does not wait. :raises DaemonDied:"""
        if not self.alive:
            raise DaemonDied
        check_fence()

    async def run(self, effect: Callable[[], T]) -> T:
        """Makes a call that goes to the kernel in a thread: it takes a moment, its effect is whole, and it is not
        cancelled half-way. :raises DaemonDied:"""
        self.check()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
            await trio.sleep(self.rng.uniform(0.0, _LONGEST_S))
            self.check()
            value = effect()
            await trio.sleep(self.rng.uniform(0.0, _LONGEST_S))
        self.check()
        return value

    def check_space(self, path: Path | None = None) -> None:
        """:raises OSError: the disk is full."""
        if self.machine.disk_full or fault("disk.full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if path is None else [str(path)]))
