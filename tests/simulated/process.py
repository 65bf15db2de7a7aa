"""Processes of a simulated machine: numbers that are used again, ends that come late, and a tag on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from volant.model import ProcessIdentity


class SimProcess:
    """One process. It runs until `end`, whoever calls that."""

    def __init__(self, identity: ProcessIdentity, argv: Sequence[str], stubborn_s: float = 0.0) -> None:
        """`stubborn_s`: how long it needs to die of a signal, as one does that sits in the kernel."""
        self.identity = identity
        self.argv = tuple(argv)
        self.status: int | None = None
        self.ended = trio.Event()
        self.stubborn_s = stubborn_s
        self.on_end: Callable[[], None] = lambda: None
        self.signals: list[int] = []

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    def end(self, status: int) -> None:
        """It exits with `status`, or dies of signal `-status`."""
        if self.alive:
            self.status = status
            self.ended.set()
            self.on_end()
