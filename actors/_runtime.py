"""What all children of one system share.

A clock is read when a message comes and when it is done. Trio's own is `time.perf_counter` plus a constant (trio 0.35,
`SystemClock`); without the method in between, the two readings cost a tenth of a tell less. Any other clock, such as a
test's, is read as it is. `clock() + offset_s` is Trio's time, which deadlines and taps need.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, final

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

    __slots__ = ("_dead", "_dead_total", "born_s", "clock", "deadlines", "fence", "name", "offset_s", "rng", "tap")

    def __init__(self, name: str, rng: Random, tap: Tap | None) -> None:
        self.name = name
        self.rng = rng
        self.tap = tap
        clock = current_clock()
        self.clock: Callable[[], float] = clock.current_time
        self.offset_s = 0.0
        if type(clock).__module__.startswith("trio._core"):
            self.clock = perf_counter
            self.offset_s = clock.current_time() - perf_counter()
        self.fence = Fence(name)
        self.deadlines = Deadlines()
        self.born_s = self.clock()
        self._dead: deque[tuple[float, str, str, str, str]] = deque(maxlen=KEPT)
        self._dead_total: Counter[str] = Counter()

    def since_birth(self, at_s: float) -> float:
        """A time of `clock` as people see it: in seconds since the system began."""
        return round(at_s - self.born_s, 6)

    def show(self, kind: TapKind, name: str, sender: str, what: object) -> None:
        """Tells the tap, if there is one."""
        if self.tap is not None:
            self.tap(TapEvent(self.clock() + self.offset_s, kind, name, sender, what))

    def dead_letter(self, name: str, message: object, sender: str, why: str) -> None:
        """Remembers that `message` for `name` came to nothing."""
        self._dead_total[why] += 1
        self._dead.append((self.clock(), name, type(message).__qualname__, sender, why))
        self.show(TapKind.DEAD_LETTER, name, sender, message)

    def dead_letters(self) -> dict[str, Any]:
        return {
            "total": self._dead_total.total(),
            "by_reason": dict(self._dead_total),
            "last": [
                {"at_s": self.since_birth(at_s), "to": name, "message": kind, "from": sender, "reason": why}
                for at_s, name, kind, sender, why in self._dead
            ],
        }
