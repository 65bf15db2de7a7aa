"""The fence of an incarnation: which one a task belongs to, and whether it may still act.

Trio has no "cancel without clean-up": a cancelled task runs its `finally` blocks, which may tell, ask, commit or
delete. A killed process does nothing of the kind. So `actors.testing.kill` closes the fence of an incarnation before it
cancels its tasks. From then on `tell`, `ask`, `start_child` and `stop_child` raise `Fenced` without an effect. Replies,
timers and child tasks of the incarnation end with it anyway. A program calls `check_fence()` first where it writes to
the outside itself.

`tell` and `ask` read `name` for traces and dead letters. A closed fence is one whose `name` raises, so the switch costs
production nothing.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final


class Fence:
    """Holds the path of the incarnation that the tasks behind it belong to; "" is no incarnation."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_OUTSIDE: Final = Fence("")
current_fence: Final[ContextVar[Fence]] = ContextVar("actors.fence", default=_OUTSIDE)


def check_fence() -> None:
    """Raises when the calling task belongs to a killed incarnation. Call it before each effect on the outside.

    :raises Fenced: `actors.testing.kill` has killed the incarnation.
    """
    _ = current_fence.get().name
