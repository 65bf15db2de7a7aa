"""What all children of one system share."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Final, final

import trio
from trio.lowlevel import current_clock

from ._deadlines import Deadlines
from ._fence import Fence
from ._tap import TapEvent, TapKind

if TYPE_CHECKING:
    from ._tap import Tap

KEPT: Final = 128
"""Dead letters that are remembered; all are counted."""


@final
class Runtime:
    """The clock, chance, deadlines, fence, tap and dead letters of one system."""

    __slots__ = ("_dead", "_dead_total", "born_s", "clock", "deadlines", "fence", "name", "rng", "tap")

    def __init__(self, name: str, rng: Random, tap: Tap | None) -> None:
        self.name = name
        self.rng = rng
        self.tap = tap
        self.clock: Callable[[], float] = current_clock().current_time
        self.fence = Fence(name)
        self.deadlines = Deadlines()
        self.born_s = trio.current_time()
        self._dead: deque[tuple[float, str, str, str, str]] = deque(maxlen=KEPT)
        self._dead_total: Counter[str] = Counter()

    def since_birth(self, at_s: float) -> float:
        """A time of Trio's clock as people see it: in seconds since the system began."""
        return round(at_s - self.born_s, 6)

    def dead_letter(self, name: str, message: object, sender: str, why: str) -> None:
        """Remembers that `message` for `name` came to nothing."""
        now_s = self.clock()
        self._dead_total[why] += 1
        self._dead.append((now_s, name, type(message).__qualname__, sender, why))
        if self.tap is not None:
            self.tap(TapEvent(now_s, TapKind.DEAD_LETTER, name, sender, message))

    def dead_letters(self) -> dict[str, Any]:
        return {
            "total": self._dead_total.total(),
            "by_reason": dict(self._dead_total),
            "last": [
                {"at_s": self.since_birth(at_s), "to": name, "message": kind, "from": sender, "reason": why}
                for at_s, name, kind, sender, why in self._dead
            ],
        }
