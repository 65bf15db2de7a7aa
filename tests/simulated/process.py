"""A process of the simulated machine. It may end late, and its pid is reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from volant.model import ProcessIdentity


class SimProcess:
    """A process. It runs until `end` is called."""

    def __init__(self, identity: ProcessIdentity, argv: Sequence[str], stubborn_s: float = 0.0) -> None:
        """`stubborn_s`: how long it takes to end after a signal, as one that is stuck in the kernel."""
        self.identity = identity
        self.argv = tuple(argv)
        self.status: int | None = None
        self.ended = trio.Event()
        self.stubborn_s = stubborn_s
        self.is_expendable = True
        """Whether the kernel ends it first when the host runs out of memory."""
        self.on_end: Callable[[], None] = lambda: None
        self.signals: list[int] = []

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    def end(self, status: int) -> None:
        """Ends it with an exit status, or with signal `-status`."""
        if self.alive:
            self.status = status
            self.ended.set()
            self.on_end()
