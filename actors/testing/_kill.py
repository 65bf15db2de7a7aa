"""A simulated `kill -9`: the fences close first, then the tasks are cancelled."""

from __future__ import annotations

from .._cell import Cell, State
from .._errors import Fenced
from .._exit import Exit, ExitKind
from .._fence import Fence
from .._system import System


class _ClosedFence(Fence):
    __slots__ = ()

    @property
    def name(self) -> str:  # type: ignore[override]  # takes the place of the slot
        raise Fenced("the caller's incarnation has been killed; this call has no effect")


def kill(system: System, path: str) -> None:
    """Ends one incarnation as `kill -9` ends a process; of a supervisor, with all below it.

    Nothing that its clean-up calls has an effect (`check_fence`), and `on_stop` does not run. Its supervisor treats the
    end as a crash. With the path "" the whole system dies: nothing is restarted, and the block of `open_system` still
    has to be left.

    :raises KeyError: nothing is at `path`.
    """
    _kill(system._find(path), for_good=not path)


def _kill(cell: Cell, *, for_good: bool) -> None:
    for child in cell.supervisor._children() if cell.supervisor is not None else ():
        _kill(child, for_good=True)
    if cell.state in (State.STARTING, State.RUNNING, State.STOPPING):
        cell.fence.__class__ = _ClosedFence
        if cell.actor is not None:
            cell.actor.ctx._closed = True
        cell.conclude(Exit(ExitKind.KILLED))
        cell.interrupt()
    if for_good:
        cell.request_stop()
