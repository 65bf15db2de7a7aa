"""One budget for the JSON bodies of all requests, counted as they are read.

A body may have a megabyte and take half a minute, so a few hundred clients that never finish would fill the memory. All
bodies together may use `Limits.bodies` bytes, from their first byte to the end of their request. The first
`Limits.small_body` bytes of each are not counted: the number of connections bounds them, and nearly every request needs
no more. So clients that use up the whole budget only block other large bodies.
"""

from __future__ import annotations

from volant.model import Caller, Problem

from ._caller_limits import CallerLimits, CallerUse
from ._settings import Limits


class Bodies:
    """The budget."""

    def __init__(self, limits: Limits) -> None:
        self._left = limits.bodies
        self._free = limits.small_body

    def share(self) -> Share:
        """Returns the share of a new request, which is empty."""
        return Share(self)

    def take(self, before: int, size: int) -> int:
        """Takes the cost of `size` more bytes after `before` ones of a body. :raises Problem: 503."""
        cost = max(before + size - self._free, 0) - max(before - self._free, 0)
        if cost > self._left:
            raise Problem(
                503,
                "too-much-under-way",
                "the bodies of the requests under way are too large together",
                hint="send it again in a second",
                retry_after_s=1,
            )
        self._left -= cost
        return cost

    def give_back(self, cost: int) -> None:
        """Returns the cost to the budget."""
        self._left += cost


class Share:
    """The part of the budget that one request uses."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._read = 0
        self._cost = 0
        self._owned = 0
        self._owner: tuple[Caller, CallerUse, CallerLimits] | None = None

    def belongs_to(self, caller: Caller, use: CallerUse, limits: CallerLimits) -> None:
        """Counts the body for a caller as well, if limits apply to it."""
        if caller.limited:
            self._owner = caller, use, limits

    def take(self, size: int) -> None:
        """Counts `size` more bytes, before they are stored.

        :raises Problem: 503, the budget is used up; 429, the caller's limit is reached
        """
        if size:
            if self._owner is not None:
                caller, use, limits = self._owner
                use.take_body(caller, size, limits)
                self._owned += size
            self._cost += self._bodies.take(self._read, size)
            self._read += size

    def release(self) -> None:
        """Returns everything, as the body is not stored any more."""
        self._bodies.give_back(self._cost)
        if self._owned and self._owner is not None:
            self._owner[1].give_back_body(self._owner[0], self._owned)
        self._read = self._cost = self._owned = 0
