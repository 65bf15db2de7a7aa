"""A tree of supervisors, embedded in any Trio program as an async context manager."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any, final

import trio

from ._cell import PERMANENT, Cell, Child, State
from ._exit import open_hidden_nursery
from ._ref import Ref
from ._runtime import Runtime
from ._show import as_text
from ._supervisor import DynamicSupervisor, Supervisor
from ._tap import Tap, ambient_tap


@final
class System:
    """A running tree. It has no public constructor: `open_system` makes it."""

    __slots__ = ("_root", "_runtime")

    def __init__(self, root: Cell, runtime: Runtime) -> None:
        self._root = root
        self._runtime = runtime

    @property
    def name(self) -> str:
        """What the system is called."""
        return self._runtime.name

    def __getitem__(self, path: str) -> Any:
        """What is at a path such as `vms/demo`: the ref of an actor, a supervisor, or the `Child` of a function.

        For people and tests. An actor gets the refs that it uses through its constructor.

        :raises KeyError: nothing is there.
        """
        cell = self._find(path)
        return cell.ref or cell.branch or cell.child

    def whole(self) -> bool:
        """Whether every child that is there from the beginning runs; those of dynamic supervisors don't count."""
        return _whole(self._root)

    def tree(self) -> dict[str, Any]:
        """The whole tree, ready for JSON. Times are seconds since the system began."""
        return {**self._root.tree(), "name": self.name, "age_s": self._root.since_birth()}

    def format_tree(self) -> str:
        """The whole tree, as text for people."""
        return as_text(self.tree())

    def trace(self, ref: Ref[Any], last: int = 100) -> list[dict[str, Any]]:
        """The last messages that an actor handled, over all incarnations, the oldest first, ready for JSON.

        Each has its type and not its content, when it came and from whom ("" from outside of the system), how long it
        waited and took, and what came of it: `handled`, `deferred`, `refused`, `crashed`, or `interrupted` by the end
        of the actor. At most 100 are remembered.
        """
        return ref._mailbox.trace(last)

    def dead_letters(self) -> dict[str, Any]:
        """What came to nothing, ready for JSON: how much of it, for which reasons, and the last 128.

        Tells to an actor that was down, tells that were queued when an incarnation ended, and replies whose asker had
        left.
        """
        return self._runtime.dead_letters()

    def _find(self, path: str) -> Cell:
        cell, rest = self._root, path
        while rest:
            for child in cell.branch._children() if cell.branch is not None else ():
                name = child.child.name
                if rest == name or rest.startswith(name + "/"):
                    cell, rest = child, rest[len(name) + 1 :]
                    break
            else:
                raise KeyError(path)
        return cell


@asynccontextmanager
async def open_system(
    root: Supervisor | DynamicSupervisor, *, rng: Random | None = None, name: str = "system", tap: Tap | None = None
) -> AsyncIterator[System]:
    """Starts a tree, hands out its `System`, and stops it in reverse order when the block is left, however it is left.

    When the root gives up, the block is cancelled, and `TooManyRestarts` comes out of it. What a child raises while
    the tree is started comes out as it is.

    `rng` decides the jitter of restarts. `tap` is called with everything that happens in the system, in order.
    """
    cell = Child(name, root)._cell
    runtime = Runtime(name, rng or Random(), tap or ambient_tap.get())
    body = trio.CancelScope()
    watch = trio.CancelScope(shield=True)

    async def keep() -> None:
        try:
            exit_ = await cell.incarnate()
        finally:
            cell.finish()
            body.cancel()
        if exit_.abnormal and exit_.exception is not None:
            raise exit_.exception

    async def watch_deadlines() -> None:
        with watch:
            await runtime.deadlines.watch()

    async with open_hidden_nursery() as nursery:
        cell.prepare(None, runtime, nursery)
        cell.path = ""
        nursery.start_soon(watch_deadlines, name=f"{name}: deadlines")
        nursery.start_soon(keep, name=name)
        try:
            await cell.settled.wait()
            if cell.started_once:
                with body:
                    yield System(cell, runtime)
        finally:
            cell.request_stop()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + cell.shutdown_s + 1):
                await cell.wait_ended()
            watch.cancel()


def _whole(cell: Cell) -> bool:
    if cell.state is not State.RUNNING:
        return cell.state is State.EXITED and cell.child.restart is not PERMANENT and _content(cell)
    if isinstance(cell.branch, Supervisor):
        return all(_whole(child) for child in cell.branch._children())
    return True


def _content(cell: Cell) -> bool:
    return cell.exit is not None and not cell.exit.abnormal
