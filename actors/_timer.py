"""A message that an actor sends itself later.

A timer is an entry in the heap of deadlines of its system (`_deadlines.py`), without a task. It ends with the
incarnation that set it.

Rejected: timers that repeat. When handling takes longer than the period, messages pile up or are left out, and only the
actor knows which is right. A handler sets the next timer itself: at its beginning for a steady rhythm, at its end for a
pause of that length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from ._mailbox import Mailbox


@final
class Timer:
    """A message that an actor has sent itself. It has no public constructor: `ctx.send_after` makes it."""

    __slots__ = ("_all", "_mailbox", "_waiting", "at_s", "message", "sender")

    def __init__(self, mailbox: Mailbox, message: object, at_s: float, all_: dict[Timer, None]) -> None:
        self.at_s = at_s
        self.sender = mailbox.name
        self.message: object = message
        self._mailbox: Mailbox | None = mailbox
        self._all = all_
        self._waiting = True
        all_[self] = None

    @property
    def pending(self) -> bool:
        """Whether the message was neither cancelled nor handled yet."""
        return self._waiting

    def cancel(self) -> None:
        """Cancels the timer, even if its message is in the mailbox already. May be called again."""
        if self._waiting:
            self.message = None
            self._end()

    def take(self) -> object:
        """Returns the message for its handler; None if it was cancelled."""
        self._end()
        return self.message

    def over(self) -> bool:
        return not self._waiting

    def expire(self) -> None:
        mailbox, self._mailbox = self._mailbox, None
        if mailbox is not None:
            mailbox.deliver_timer(self)

    def _end(self) -> None:
        self._waiting = False
        self._mailbox = None
        self._all.pop(self, None)
