"""The parts that all children of a system share."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Final, final

from trio.lowlevel import current_clock

from ._deadlines import Deadlines
from ._tap import TapEvent, TapKind

if TYPE_CHECKING:
    from ._tap import Tap

KEPT: Final = 128
"""Dead letters that a system keeps; it counts all."""


@final
class Runtime:
    """Holds the clock, random numbers, deadlines, tap and dead letters of one system."""

    __slots__ = ("_dead", "_dead_total", "began_s", "clock", "deadlines", "name", "rng", "tap")

    def __init__(self, name: str, rng: Random, tap: Tap | None) -> None:
        self.name = name
        self.rng = rng
        self.tap = tap
        # Trio's own, without the look-up of `trio.current_time`: it is read twice for each message.
        self.clock: Callable[[], float] = current_clock().current_time
        self.deadlines = Deadlines()
        self.began_s = self.clock()
        self._dead: deque[tuple[float, str, str, str, str]] = deque(maxlen=KEPT)
        self._dead_total: Counter[str] = Counter()

    def since_start(self, at_s: float) -> float:
        """Returns a time of `clock` in seconds since the system began."""
        return round(at_s - self.began_s, 6)

    def show(self, kind: TapKind, name: str, sender: str, what: object) -> None:
        """Calls the tap, if there is one."""
        if self.tap is not None:
            self.tap(TapEvent(self.clock(), kind, name, sender, what))

    def dead_letter(self, name: str, message: object, sender: str, why: str) -> None:
        """Records that `message` for `name` was not handled or answered."""
        self._dead_total[why] += 1
        self._dead.append((self.clock(), name, type(message).__qualname__, sender, why))
        self.show(TapKind.DEAD_LETTER, name, sender, message)

    def dead_letters(self) -> dict[str, Any]:
        return {
            "total": self._dead_total.total(),
            "by_reason": dict(self._dead_total),
            "last": [
                {"at_s": self.since_start(at_s), "to": name, "message": kind, "from": sender, "reason": why}
                for at_s, name, kind, sender, why in self._dead
            ],
        }
