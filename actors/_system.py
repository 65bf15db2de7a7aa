"""Runs a tree of supervisors inside any Trio program, as an async context manager."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, TypeAlias, final

import trio

from ._cell import PERMANENT, Cell, Child, State
from ._exit import open_hidden_nursery
from ._ref import Ref
from ._runtime import Runtime
from ._supervisor import DynamicSupervisor, Supervisor
from ._tap import Tap, ambient_tap

Node: TypeAlias = "Mapping[str, Any]"


def as_text(tree: Node) -> str:
    """Returns one line for each child, drawn as the command `tree` does."""
    return "\n".join(_lines(tree, "", ""))


def _lines(node: Node, first: str, rest: str) -> list[str]:
    lines = [first + " ".join(_words(node))]
    children = node.get("children", ())
    for child in children:
        last_one = child is children[-1]
        lines += _lines(child, rest + ("└─ " if last_one else "├─ "), rest + ("   " if last_one else "│  "))
    return lines


def _words(node: Node) -> list[str]:
    words = [node["name"], f"[{node['kind']}]", node["state"]]
    if node["restarts"]:
        words.append(f"{node['restarts']} restarts")
    mailbox = node.get("mailbox")
    if mailbox and mailbox["depth"]:
        words.append(f"mailbox {mailbox['depth']}/{mailbox['capacity']}")
        if mailbox["oldest_s"] is not None:
            words.append(f"for {mailbox['oldest_s']:.1f} s")
    if node["exits"]:
        last = node["exits"][-1]
        words.append(f"(at {last['at_s']:.1f} s {last['reason'].splitlines()[0]})")
    return words


@final
class System:
    """Holds a running tree. It has no public constructor: `open_system` makes it."""

    __slots__ = ("_root", "_runtime")

    def __init__(self, root: Cell, runtime: Runtime) -> None:
        self._root = root
        self._runtime = runtime

    @property
    def name(self) -> str:
        """The name that `open_system` got."""
        return self._runtime.name

    def __getitem__(self, path: str) -> Any:
        """Returns the ref of the actor at a path such as `vms/demo`; or the supervisor; or the `Child` of a function.

        It is for people and tests. An actor gets the refs that it uses through its constructor.

        :raises KeyError: nothing is at `path`.
        """
        cell = self._find(path)
        return cell.ref or cell.supervisor or cell.child

    def all_running(self) -> bool:
        """Returns whether all children run that the tree began with. Children of dynamic supervisors don't count."""
        return _all_running(self._root)

    def tree(self) -> dict[str, Any]:
        """Returns the tree, ready for JSON. Times are in seconds since the system began."""
        return {**self._root.tree(), "name": self.name, "age_s": self._root.since_start()}

    def format_tree(self) -> str:
        """Returns the tree as text for people."""
        return as_text(self.tree())

    def trace(self, ref: Ref[Any], last: int = 100) -> list[dict[str, Any]]:
        """Returns the last messages that an actor handled, over all incarnations, the oldest first, ready for JSON.

        Each row has the type of the message, never its content; when it came and its sender ("" outside of the system);
        how long it waited and took, in seconds; and the outcome: `handled`, `deferred`, `refused`, `crashed`, or
        `interrupted` by the end of the actor. An actor keeps 100 rows.
        """
        return ref._mailbox.trace(last)

    def dead_letters(self) -> dict[str, Any]:
        """Returns messages that were never handled or answered, ready for JSON: the total, by reason, and the last 128.

        These are tells to an actor that was down, tells that were queued when an incarnation ended, and replies whose
        asker had left.
        """
        return self._runtime.dead_letters()

    def _find(self, path: str) -> Cell:
        cell, rest = self._root, path
        while rest:
            for child in cell.supervisor._children() if cell.supervisor is not None else ():
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
    """Starts a tree, and stops it in reverse order when the block ends, however it ends.

    A scope around it cancels the block, and then this shutdown begins. It does not cancel started children: each ends
    when its turn comes, within its `shutdown_s`.

    When the root gives up, the block is cancelled and `TooManyRestarts` comes out. What a child raises before it has
    started comes out as it is.

    :param rng: decides the jitter of restarts.
    :param tap: is called with everything that happens in the system, in order.
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
            await cell.start_finished.wait()
            if cell.started_once:
                with body:
                    yield System(cell, runtime)
        finally:
            cell.request_stop()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + cell.shutdown_s + 1):
                await cell.wait_ended()
            watch.cancel()


def _all_running(cell: Cell) -> bool:
    if cell.state is not State.RUNNING:
        return cell.state is State.EXITED and cell.child.restart is not PERMANENT and _ended_well(cell)
    if isinstance(cell.supervisor, Supervisor):
        return all(_all_running(child) for child in cell.supervisor._children())
    return True


def _ended_well(cell: Cell) -> bool:
    return cell.exit is not None and not cell.exit.abnormal
