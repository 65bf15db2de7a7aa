"""A child: what a supervisor is told about it, and what it keeps of it over all incarnations.

Outer cancellation reaches every task under it at once, in no order. So a child that has started is shielded, and its
supervisor alone lifts the shield, when its turn has come. Before it has started it stays cancellable, and what goes
wrong with it belongs to whoever starts it.
"""

from __future__ import annotations

import enum
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar, final, overload

import trio
from trio.lowlevel import checkpoint

from ._actor import Actor, live
from ._errors import StartFailed, StartTimeout
from ._exit import Exit, ExitKind, split_cancelled
from ._fence import Fence, current_fence
from ._message import Handler
from ._ref import Ref
from ._runtime import Runtime
from ._tap import TapKind

A = TypeVar("A", bound=Actor)
C_co = TypeVar("C_co", bound="Actor | None", covariant=True)

_HISTORY = 8
_SHOWN = 16
_SETTLED: Final = trio.Event()
_SETTLED.set()
_logger = logging.getLogger("actors")


class Restart(enum.Enum):
    """When a child that has ended is started again."""

    PERMANENT = "permanent"
    """Always, unless it was stopped."""
    TRANSIENT = "transient"
    """When it crashed."""
    TEMPORARY = "temporary"
    """Never."""


PERMANENT = Restart.PERMANENT
TRANSIENT = Restart.TRANSIENT
TEMPORARY = Restart.TEMPORARY


class State(enum.StrEnum):
    """Where a child is in its life."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    RESTARTING = "restarting"
    GIVING_UP = "giving up"
    EXITED = "exited"


class Started(Protocol):
    """How a supervised function says that it has started. `trio.TaskStatus[None]` fits it."""

    def started(self, value: None = None, /) -> None: ...


class Startable(Protocol):
    """An async function that a supervisor can run: `async def serve(*, task_status: Started) -> None`."""

    def __call__(self, *, task_status: Any) -> Awaitable[object]: ...


class Branch(ABC):
    """A child that has children."""

    kind: str

    @abstractmethod
    async def _run(self, cell: Cell) -> None:
        """Starts the children, calls `cell.mark_started`, and stops them in reverse when it is cancelled."""

    @abstractmethod
    def _children(self) -> Sequence[Cell]:
        """The children, in the order in which they were started."""

    @abstractmethod
    def _budget_s(self) -> float:
        """The most that stopping the children takes, if each keeps to its budget."""

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """Figures about the supervisor itself."""


@final
class Child(Generic[C_co]):
    """What a supervisor needs to know of a child.

    `start` is the class of an `Actor`, or a callable that makes one (`functools.partial`); or an async function that
    takes `task_status` and calls its `started()`; or a `Supervisor` or `DynamicSupervisor`.

    A started child is cancelled by its supervisor alone. A function gets the cancellation at once; a child that wants
    to end politely is an `Actor` with `on_stop`. `shutdown_s` bounds the end of an actor, its clean-up included; of a
    function it says how long its own shields may last. A supervisor's budget is what its children need. A start has
    `start_timeout_s` (30 s; a supervisor's is left to the deadlines of its children).

    A `Child` lives in one place at a time.

    :raises ValueError: a name that is empty, or a time that is not positive.
    :raises TypeError: `start` is none of these.
    """

    __slots__ = ("_cell", "name", "restart", "start", "start_timeout_s")

    @overload
    def __init__(
        self: Child[None],
        name: str,
        start: Branch | Startable,
        restart: Restart = PERMANENT,
        *,
        start_timeout_s: float | None = None,
        shutdown_s: float | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: Child[A],
        name: str,
        start: Callable[[], A],
        restart: Restart = PERMANENT,
        *,
        start_timeout_s: float | None = None,
        shutdown_s: float | None = None,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        start: Branch | Startable | Callable[[], Actor],
        restart: Restart = PERMANENT,
        *,
        start_timeout_s: float | None = None,
        shutdown_s: float | None = None,
    ) -> None:
        if not name or name.startswith("/") or name.endswith("/"):
            raise ValueError(f"a child needs a name that neither is empty nor begins or ends with /, not {name!r}")
        if start_timeout_s is None:
            start_timeout_s = math.inf if isinstance(start, Branch) else 30.0
        if not start_timeout_s > 0:
            raise ValueError(f"start_timeout_s of {name} must be positive, not {start_timeout_s}")
        if isinstance(start, Branch):
            if shutdown_s is not None:
                raise ValueError(f"{name} is a supervisor: its shutdown_s is what its children need")
        elif not callable(start):
            raise TypeError(f"{name} cannot be started: {start!r} is no actor, async function or supervisor")
        if shutdown_s is None:
            shutdown_s = 5.0
        if not 0 < shutdown_s < math.inf:
            raise ValueError(f"shutdown_s of {name} must be positive and finite, not {shutdown_s}")
        self.name = name
        self.start = start
        self.restart = restart
        self.start_timeout_s = start_timeout_s
        self._cell = Cell(self, shutdown_s)

    @property
    def shutdown_s(self) -> float:
        """The budget for its end, in seconds."""
        return self._cell.shutdown_s

    @property
    def ref(self: Child[A]) -> Ref[A]:
        """The ref of the actor, also before it is started: hand it to siblings that start later.

        :raises TypeError: the child is no actor.
        """
        ref = self._cell.ref
        if ref is None:
            raise TypeError(f"{self.name} is no actor, and has no ref")
        return ref

    def __repr__(self) -> str:
        return f"<Child {self.name} ({self._cell.kind}, {self.restart.value}, {self._cell.state})>"


@final
class Cell:
    """The life of a child over all its incarnations."""

    __slots__ = (
        "_ended",
        "_shutdown_s",
        "actor",
        "branch",
        "child",
        "closing",
        "exit",
        "fence",
        "handlers",
        "history",
        "inner",
        "kind",
        "limit",
        "loop",
        "nursery",
        "outer",
        "path",
        "reason",
        "ref",
        "restarts",
        "runtime",
        "settled",
        "start_error",
        "started",
        "started_once",
        "state",
        "stop_requested",
        "window",
    )

    runtime: Runtime
    nursery: trio.Nursery
    inner: trio.CancelScope
    outer: trio.CancelScope
    settled: trio.Event
    fence: Fence

    def __init__(self, child: Child[Any], shutdown_s: float) -> None:
        start = child.start
        self.child = child
        self._shutdown_s = shutdown_s
        self.path = child.name
        self.branch = start if isinstance(start, Branch) else None
        self.ref: Ref[Any] | None = None
        if self.branch is not None:
            self.kind = self.branch.kind
        elif _is_async(start):
            self.kind = "task"
        else:
            self.kind = "actor"
            self.ref = Ref(self)
        self.actor: Actor | None = None
        self.handlers: Mapping[type, Handler] = {}
        self.loop: trio.CancelScope | None = None
        self.state = State.NEW
        self.exit: Exit | None = None
        self.reason: Exit | None = None
        self.start_error: BaseException | None = None
        self.started = self.started_once = self.stop_requested = self.closing = False
        self.restarts = 0
        self.window: list[float] | None = None
        self.limit: _StartLimit | None = None
        self._ended: trio.Event | None = None
        self.history: deque[tuple[float, str]] | None = None

    @property
    def shutdown_s(self) -> float:
        return self._shutdown_s if self.branch is None else self.branch._budget_s()

    @property
    def label(self) -> str:
        """The path, or the name of the root, which has none."""
        return self.path or self.child.name

    @property
    def alive(self) -> bool:
        return self.state not in (State.NEW, State.EXITED)

    def prepare(self, parent: Cell | None, runtime: Runtime, nursery: trio.Nursery) -> None:
        """:raises RuntimeError: the child lives already."""
        if self.alive:
            raise RuntimeError(f"{self.label} lives already; one Child cannot be in two places")
        self.runtime = runtime
        self.nursery = nursery
        if self.ref is not None:
            self.ref._mailbox.attach(runtime)
        self.path = self.child.name if parent is None or not parent.path else f"{parent.path}/{self.child.name}"
        self.settled = trio.Event()
        self._ended = None
        self.state = State.STARTING
        self.start_error = None
        self.started = self.started_once = self.stop_requested = self.closing = False
        self.outer = trio.CancelScope()
        self.inner = trio.CancelScope()
        self.window = None

    async def incarnate(self) -> Exit:
        """Runs one incarnation to its end.

        Raises only what is not the incarnation's own: a cancellation from outside, and what is no `Exception`.
        """
        self.state = State.STARTING
        self.started = self.closing = False
        self.reason = self.actor = self.loop = None
        self.fence = Fence(self.path)
        current_fence.set(self.fence)
        if self.started_once:
            self.outer, self.inner = trio.CancelScope(), trio.CancelScope()
        outer, inner = self.outer, self.inner
        self._show(TapKind.STARTING)
        if self.child.start_timeout_s < math.inf:
            self.limit = _StartLimit(self)
            self.runtime.deadlines.add(trio.current_time() + self.child.start_timeout_s, self.limit)
        escaped: BaseException | None = None
        try:
            try:
                with outer, inner:
                    await self._body()
            except BaseException as exc:
                escaped = exc
            if inner.cancelled_caught and self.closing:
                _logger.warning("%s: its clean-up was cut short after %g s", self.label, self.shutdown_s)
            failure, cancelled = split_cancelled(escaped)
            exit_ = self._verdict(failure, cancelled)
            self._note(exit_)
            if self.ref is not None:
                self.ref._mailbox.end(exit_)
            if exit_.exception is not None and not isinstance(exit_.exception, Exception):
                raise exit_.exception
            if cancelled is not None:
                raise cancelled
            return exit_
        finally:
            del escaped

    def _body(self) -> Awaitable[object]:
        start: Any = self.child.start
        if self.branch is not None:
            return self.branch._run(self)
        if self.kind == "task":
            running: Awaitable[object] = start(task_status=_Started(self))
            return running
        actor = start()
        if not isinstance(actor, Actor):
            if inspect.iscoroutine(actor):
                actor.close()
            raise TypeError(f"{self.path}: {start!r} made {actor!r}, which is no Actor")
        return live(self, actor)

    def mark_started(self) -> None:
        """From here on the child is shielded, and its failures are its supervisor's."""
        if self.started or self.closing or self.outer.cancel_called:
            return
        self.started = self.started_once = True
        self.state = State.RUNNING
        self.inner.shield = True
        self._unlimit()
        self.settle()
        self._show(TapKind.STARTED)

    def settle(self) -> None:
        """It is known whether it has started."""
        self.settled.set()
        self.settled = _SETTLED  # an idle child keeps no event of its own

    async def wait_ended(self) -> None:
        """Waits until nothing of it is left. Always a checkpoint."""
        if self.alive:
            if self._ended is None:
                self._ended = trio.Event()
            await self._ended.wait()
        else:
            await checkpoint()

    def finish(self) -> None:
        """Nothing of it is left."""
        self.state = State.EXITED
        self.settle()
        if self._ended is not None:
            self._ended.set()

    def begin_end(self) -> None:
        """From here on nothing but the budget cuts the clean-up short."""
        if not self.closing:
            self.closing = True
            self._unlimit()
            self.state = State.STOPPING
            self.inner.shield = True
            self.inner.deadline = min(self.inner.deadline, trio.current_time() + self.shutdown_s)

    def fail(self, error: BaseException | None) -> None:
        """Ends the incarnation with its first failure, and answers all askers at once."""
        if self.reason is None and error is not None:
            expected = self.stop_requested and isinstance(error, Exception)
            self.conclude(Exit(ExitKind.STOPPED if expected else ExitKind.CRASHED, error))

    def conclude(self, reason: Exit) -> None:
        """Sets the reason of the end, and answers all askers with it at once. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            if self.ref is not None:
                self.ref._mailbox.close(reason)

    def interrupt(self) -> None:
        """Cancels what runs: an actor's handler, or the start, function or supervisor as a whole."""
        if self.loop is not None:
            self.loop.cancel()
        elif not self.closing:
            self.outer.cancel()
            self.inner.shield = False

    def request_stop(self) -> None:
        """Asks for the end and returns; `wait_ended` waits for it."""
        if self.stop_requested or self.state in (State.NEW, State.EXITED):
            return
        self.stop_requested = True
        if self.state is State.GIVING_UP:
            return
        self.state = State.STOPPING
        if self.ref is not None and self.started and not self.closing:
            if self.reason is None:
                self.ref._mailbox.close(Exit(ExitKind.STOPPED))
            self.inner.deadline = trio.current_time() + self.shutdown_s
        self.interrupt()

    def pause(self, state: State) -> trio.CancelScope:
        """Between two incarnations, or after the last: a scope that `request_stop` cancels while it restarts."""
        self.state = state
        self.started = self.closing = False
        self.loop = None
        self.outer = trio.CancelScope()
        return self.outer

    def restarts_after(self, exit_: Exit) -> bool:
        if self.stop_requested:
            return False
        if self.child.restart is PERMANENT:
            return True
        return self.child.restart is TRANSIENT and exit_.abnormal

    def since_birth(self) -> float:
        return self.runtime.since_birth(self.runtime.clock())

    def tree(self) -> dict[str, Any]:
        node: dict[str, Any] = {
            "name": self.child.name,
            "path": self.path,
            "kind": self.kind,
            "state": str(self.state),
            "restart": self.child.restart.value,
            "restarts": self.restarts,
            "exits": [{"at_s": at_s, "reason": reason} for at_s, reason in self.history or ()],
        }
        if self.ref is not None:
            mailbox = self.ref._mailbox
            depth, oldest_s = len(mailbox.queue), mailbox.oldest_s()
            node["mailbox"] = {"depth": depth, "capacity": mailbox.capacity, "oldest_s": oldest_s}
        if self.branch is not None:
            node |= self.branch.statistics()
            node["children"] = [cell.tree() for cell in self.branch._children()]
        return node

    def inspect(self) -> dict[str, Any]:
        node = self.tree()
        if self.ref is not None:
            mailbox = self.ref._mailbox
            node["mailbox"] = mailbox.statistics()
            node |= mailbox.activity()
            node["recent"] = [message["message"] for message in mailbox.trace(_SHOWN)]
            actor = self.actor if self.state is State.RUNNING else None
            if actor is not None:
                node["tasks"] = [task.name for task in actor.ctx._tasks]
                node["timers"] = len(actor.ctx._timers)
                node["actor"] = _state_of(actor)
        return node

    def _unlimit(self) -> None:
        if self.limit is not None:
            self.limit.cell = None
            self.limit = None

    def _show(self, kind: TapKind, what: object = None) -> None:
        self.runtime.show(kind, self.path, "", what)

    def _verdict(self, failure: BaseException | None, cancelled: BaseException | None) -> Exit:
        if self.reason is not None:
            return self.reason
        if failure is not None and not (self.stop_requested and isinstance(failure, Exception)):
            return Exit(ExitKind.CRASHED, failure)
        if self.stop_requested or cancelled is not None:
            return Exit(ExitKind.STOPPED, failure)
        if self.started:
            return Exit(ExitKind.NORMAL)
        if self.outer.cancel_called:
            limit_s = self.child.start_timeout_s
            return Exit(ExitKind.CRASHED, StartTimeout(f"{self.label} has not started within {limit_s:g} s"))
        return Exit(ExitKind.CRASHED, StartFailed(f"{self.label} ended without having said that it started"))

    def _note(self, exit_: Exit) -> None:
        self.exit = exit_
        self.actor = None
        self._unlimit()
        self._show(TapKind.EXIT, exit_)
        if exit_.kind is ExitKind.STOPPED and exit_.exception is None:
            return
        if self.history is None:
            self.history = deque(maxlen=_HISTORY)
        self.history.append((self.since_birth(), str(exit_)))
        if exit_.abnormal and self.started_once:
            _logger.warning("%s %s", self.label, exit_, exc_info=exit_.exception)
        elif exit_.exception is not None:
            _logger.info("%s %s", self.label, exit_, exc_info=exit_.exception)


def _state_of(actor: Actor) -> dict[str, object]:
    try:
        return dict(actor.inspect())
    except Exception as exc:
        _logger.warning("%s cannot be inspected", actor.ctx.name, exc_info=exc)
        return {"error": f"{type(exc).__name__}: {exc}"}


def _is_async(start: object) -> bool:
    while isinstance(start, partial):
        start = start.func
    if isinstance(start, type):
        return False
    return inspect.iscoroutinefunction(start) or inspect.iscoroutinefunction(type(start).__call__)


@final
class _StartLimit:
    """The deadline of one start. It stays in the heap for a while when it is over, and keeps nothing alive."""

    __slots__ = ("cell",)

    def __init__(self, cell: Cell) -> None:
        self.cell: Cell | None = cell

    def over(self) -> bool:
        return self.cell is None

    def expire(self) -> None:
        if self.cell is not None:
            self.cell.outer.cancel()


@final
class _Started:
    __slots__ = ("_cell",)

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    def started(self, value: None = None, /) -> None:
        self._cell.mark_started()
