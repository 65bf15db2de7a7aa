"""Decides how many warm processes a template should have, and when they may be started, without a clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

from ._key import TemplateSpec

_TOGETHER_S = 10.0
"""Clones that begin within this time need separate processes: starting one may take as long on a busy host."""
_REMEMBERED = 64
_SHARE_OF_MEMORY = 4
_QUIET_S = 0.5
"""How long a VM that has just begun has the host to itself."""
_REFILL_S = 1.5
"""Longer than the start of a process, including the delay before it."""


class WarmPoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of the pool."""

    each: int | None = None
    """The number of processes per template; 0 for no pool. None for the number of its clones that recently began
    together."""
    most: int = 4
    """The maximum per template if `each` is None."""
    max_mb: int = 2048
    """The memory of all guests together."""
    idle_s: float = 600.0
    """The time without a clone after which a template gets no processes."""


class Use(msgspec.Struct):
    """The recent clones of a template."""

    spec: TemplateSpec
    times: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    not_before: float = float("-inf")
    """The earliest start of the next process."""

    @property
    def at(self) -> float:
        """When the last clone began."""
        return self.times[-1]

    def note(self, now: float) -> None:
        """Records that a clone begins, or is expected."""
        self.times.append(now)

    def idle_at(self, limits: WarmPoolLimits) -> float:
        """Returns when the template counts as idle. It is the only formula for this: two that round differently would
        make a waiting task spin."""
        return self.at + limits.idle_s

    def count(self, now: float, limits: WarmPoolLimits) -> int:
        """Returns how many processes the template should have, if there is memory."""
        if now >= self.idle_at(limits):
            return 0
        if limits.each is not None:
            return limits.each
        return min(most_together(each for each in self.times if each > now - limits.idle_s), limits.most)


def most_together(times: Iterable[float]) -> int:
    """Returns the largest number of clones that began within ten seconds; at least 1. `times` ascend."""
    window: deque[float] = deque()
    most = 1
    for time in times:
        window.append(time)
        while time - window[0] >= _TOGETHER_S:
            window.popleft()
        most = max(most, len(window))
    return most


def wanted(uses: Mapping[str, Use], now: float, limits: WarmPoolLimits, available_mb: int) -> dict[str, int]:
    """Returns how many processes each template should have, newest use first, as long as there is memory.

    :param available_mb: the host's memory for them; if their number follows demand, they use a quarter of it
    """
    left_mb = limits.max_mb
    if limits.each is None:
        left_mb = min(left_mb, available_mb // _SHARE_OF_MEMORY)
    found = {}
    for digest, use in sorted(uses.items(), key=lambda each: -each[1].at):
        memory_mb = use.spec.key.memory_mb
        if count := min(use.count(now, limits), left_mb // memory_mb):
            found[digest] = count
            left_mb -= count * memory_mb
    return found


def pause_s(before_last: float, last: float) -> float:
    """Returns the seconds after the last clone began in which no process may be started.

    If clones follow each other faster than the pool can be filled, filling it would slow them down, so it waits until
    they seem to be over. The last interval alone is no measure, as a VM that claims a process starts sooner.
    """
    return _QUIET_S if last - before_last >= _REFILL_S else _REFILL_S
