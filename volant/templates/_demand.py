"""How many warm processes a template should have, and when they may be started: decisions without a clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import msgspec

from ._key import TemplateSpec

_TOGETHER_S = 10.0
"""Clones that begin within this time can't share a process: starting one may take as long on a busy host."""
_REMEMBERED = 64
_SHARE_OF_MEMORY = 4
_QUIET_S = 0.5
"""A VM that has just begun has the host for itself for so long."""
_REFILL_S = 1.5
"""Longer than it takes to start a process, the pause before it included."""


class WarmPoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How large the pool may be."""

    each: int | None = None
    """Processes for one template; 0: there is no pool. None: as many as clones of it began together lately."""
    most: int = 4
    """The most of them where `each` is None."""
    max_mb: int = 2048
    """Memory of all guests together."""
    idle_s: float = 600.0
    """A template that no VM went on from for so long has none."""


class Use(msgspec.Struct):
    """The clones of a template that began lately."""

    spec: TemplateSpec
    times: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    not_before: float = float("-inf")
    """When the next process may be started."""

    @property
    def at(self) -> float:
        """When the last one began."""
        return self.times[-1]

    def note(self, now: float) -> None:
        """Notes that a clone begins, or is expected."""
        self.times.append(now)

    def idle_at(self, limits: WarmPoolLimits) -> float:
        """Returns when the template counts as idle. In one place: two formulas that round differently would make a task
        that waits for it spin."""
        return self.at + limits.idle_s

    def count(self, now: float, limits: WarmPoolLimits) -> int:
        """Returns how many processes the template should have, as far as there is memory."""
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
    """Returns how many processes each template should have; the newest use first, as far as the memory goes.

    :param available_mb: memory that the host has for them; where their number follows demand, they take a quarter of it
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
    """Returns how long after the last clone began no process may be started.

    Where clones follow each other faster than the pool can be filled in between, filling it would slow them down: then
    it waits until they seem to be over. How soon the last one followed says little, as a VM that claims a process is
    done sooner.
    """
    return _QUIET_S if last - before_last >= _REFILL_S else _REFILL_S
