"""A simulated `kill -9`: first the doors, then the tasks.

Trio has no "cancel without clean-up": a cancelled task runs its `finally` blocks, which may tell, ask, commit or
delete. A process that is killed does nothing of the kind. So a kill first closes the fence of the incarnation.
From then on every door that checks its fence raises `Fenced` without an effect, and the clean-up that follows
runs against walls. The fence is a context variable, and so holds for every task that the incarnation started.

The doors of the runtime (`tell`, `ask`, `Deferred`, `Log.append`, `start_child`) check it. A program's own doors to
the outside call `check_fence()` first.
"""

from __future__ import annotations

from contextvars import ContextVar

from ._errors import Fenced


class Fence:
    """Open until closed, by itself or by the one around it."""

    __slots__ = ("_closed", "_outer", "name", "root", "touched")

    def __init__(self, name: str, outer: Fence | None = None) -> None:
        self.name = name
        self.root: Fence = self if outer is None else outer.root
        #: Of the root: whether a fence anywhere below it was ever closed. As long as not, nobody need check.
        self.touched = False
        self._closed = False
        self._outer = outer

    def close(self) -> None:
        """Shuts every door for whoever is behind this fence."""
        self._closed = self.root.touched = True

    def shut(self) -> bool:
        """Whether this fence or one around it is closed."""
        return self._closed or (self._outer is not None and self._outer.shut())

    def check(self) -> None:
        """:raises Fenced: when this fence or one around it is closed."""
        if self.shut():
            raise Fenced(f"{self.name} has been killed; this call of it has no effect")


current_fence: ContextVar[Fence | None] = ContextVar("actors.fence", default=None)


def check_fence() -> None:
    """Call it first in every door to the outside, so that an incarnation that counts as killed has no effect.

    :raises Fenced: when the calling task belongs to an incarnation that `System.kill` has killed.
    """
    fence = current_fence.get()
    if fence is not None and fence.root.touched:
        fence.check()
