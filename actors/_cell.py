"""A child: its specification (`Child`), and its state over all incarnations (`Cell`, as Akka calls it).

A cancelled scope reaches every task below it at once, in no order. So a started child is shielded, and its supervisor
alone lifts the shield, when the child's turn comes. Until it has started, a child is cancellable, and what it raises
belongs to whoever starts it.
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

from ._actor import Actor, run_incarnation
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
_FINISHED: Final = trio.Event()
_FINISHED.set()
_logger = logging.getLogger("actors")


class Restart(enum.Enum):
    """When a child that has ended starts again."""

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
    """The state of a child."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    RESTARTING = "restarting"
    GIVING_UP = "giving up"
    EXITED = "exited"


class Started(Protocol):
    """The `task_status` of a supervised function, which calls `started()`. `trio.TaskStatus[None]` fits it."""

    def started(self, value: None = None, /) -> None: ...


class Startable(Protocol):
    """An async function that a supervisor can run: `async def serve(*, task_status: Started) -> None`."""

    def __call__(self, *, task_status: Any) -> Awaitable[object]: ...


class SupervisorBase(ABC):
    """The part of a supervisor that cells use."""

    kind: str

    @abstractmethod
    async def _run(self, cell: Cell) -> None:
        """Starts the children, calls `cell.mark_started`, and stops them in reverse when it is cancelled."""

    @abstractmethod
    def _children(self) -> Sequence[Cell]:
        """Returns the children, in the order of their start."""

    @abstractmethod
    def _budget_s(self) -> float:
        """Returns the maximum number of seconds for stopping the children, if each keeps to its budget."""

    @abstractmethod
    def statistics(self) -> dict[str, Any]:
        """Returns the settings and figures of the supervisor itself."""


@final
class Child(Generic[C_co]):
    """Says what a supervisor starts, and when it starts it again.

    Once it has started, only its supervisor cancels a child: a cancelled scope around the tree does not reach it. A
    function gets the cancellation when its turn comes; a child that has to do something before it ends is an `Actor`
    with `on_stop`.

    A `Child` runs in one place at a time.

    :param start: the class of an `Actor`, or a callable that makes one (`functools.partial`); an async function that
        takes `task_status` and calls its `started()`; or a `Supervisor` or `DynamicSupervisor`.
    :param start_timeout_s: the deadline of a start, in seconds: 30, and none for a supervisor, whose children have
        their own.
    :param shutdown_s: the budget for the end, in seconds: of an actor with its clean-up; of a function the time that
        its own shields may last. A supervisor has the sum of what its children need.
    :raises ValueError: the name is empty or has a slash at an end, or a time is not positive.
    :raises TypeError: `start` is none of these.
    """

    __slots__ = ("_cell", "name", "restart", "start", "start_timeout_s")

    @overload
    def __init__(
        self: Child[None],
        name: str,
        start: SupervisorBase | Startable,
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
        start: SupervisorBase | Startable | Callable[[], Actor],
        restart: Restart = PERMANENT,
        *,
        start_timeout_s: float | None = None,
        shutdown_s: float | None = None,
    ) -> None:
        if not name or name.startswith("/") or name.endswith("/"):
            raise ValueError(f"a child needs a name that neither is empty nor begins or ends with /, not {name!r}")
        if start_timeout_s is None:
            start_timeout_s = math.inf if isinstance(start, SupervisorBase) else 30.0
        if not start_timeout_s > 0:
            raise ValueError(f"start_timeout_s of {name} must be positive, not {start_timeout_s}")
        if isinstance(start, SupervisorBase):
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
        """The ref of the actor, also before its start: pass it to siblings that start later.

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
    """Holds the state of a child over all its incarnations."""

    __slots__ = (
        "_ended",
        "_shutdown_s",
        "actor",
        "child",
        "closing",
        "exit",
        "fence",
        "handlers",
        "history",
        "inner",
        "kind",
        "loop",
        "nursery",
        "outer",
        "path",
        "reason",
        "ref",
        "restarts",
        "runtime",
        "start_deadline",
        "start_error",
        "start_finished",
        "started",
        "started_once",
        "state",
        "stop_requested",
        "supervisor",
        "window",
    )

    runtime: Runtime
    nursery: trio.Nursery
    inner: trio.CancelScope
    outer: trio.CancelScope
    start_finished: trio.Event
    fence: Fence

    def __init__(self, child: Child[Any], shutdown_s: float) -> None:
        start = child.start
        self.child = child
        self._shutdown_s = shutdown_s
        self.path = child.name
        self.supervisor = start if isinstance(start, SupervisorBase) else None
        self.ref: Ref[Any] | None = None
        if self.supervisor is not None:
            self.kind = self.supervisor.kind
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
        self.start_deadline: _StartDeadline | None = None
        self._ended: trio.Event | None = None
        self.history: deque[tuple[float, str]] | None = None

    @property
    def shutdown_s(self) -> float:
        return self._shutdown_s if self.supervisor is None else self.supervisor._budget_s()

    @property
    def label(self) -> str:
        """The path, or the name of the root, which has none."""
        return self.path or self.child.name

    @property
    def alive(self) -> bool:
        return self.state not in (State.NEW, State.EXITED)

    def prepare(self, parent: Cell | None, runtime: Runtime, nursery: trio.Nursery) -> None:
        """Prepares the cell. :raises RuntimeError: the child runs already."""
        if self.alive:
            raise RuntimeError(f"{self.label} runs already; one Child cannot be in two places")
        self.runtime = runtime
        self.nursery = nursery
        if self.ref is not None:
            self.ref._mailbox.attach(runtime)
        self.path = self.child.name if parent is None or not parent.path else f"{parent.path}/{self.child.name}"
        self.start_finished = trio.Event()
        self._ended = None
        self.state = State.STARTING
        self.start_error = None
        self.started = self.started_once = self.stop_requested = self.closing = False
        self.outer = trio.CancelScope()
        self.inner = trio.CancelScope()
        self.window = None

    async def incarnate(self) -> Exit:
        """Runs one incarnation to its end.

        It raises a cancellation from outside, and what is no `Exception`. All else is the reason in the `Exit`.
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
            self.start_deadline = _StartDeadline(self)
            self.runtime.deadlines.add(trio.current_time() + self.child.start_timeout_s, self.start_deadline)
        escaped: BaseException | None = None
        try:
            try:
                with outer, inner:
                    await self._body()
            except BaseException as exc:
                escaped = exc
            if inner.cancelled_caught and self.closing:
                _logger.warning("%s: its clean-up was cancelled after %g s", self.label, self.shutdown_s)
            failure, cancelled = split_cancelled(escaped)
            exit_ = self._exit_of(failure, cancelled)
            self._record(exit_)
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
        if self.supervisor is not None:
            return self.supervisor._run(self)
        if self.kind == "task":
            running: Awaitable[object] = start(task_status=_Started(self))
            return running
        actor = start()
        if not isinstance(actor, Actor):
            if inspect.iscoroutine(actor):
                actor.close()
            raise TypeError(f"{self.path}: {start!r} made {actor!r}, which is no Actor")
        return run_incarnation(self, actor)

    def mark_started(self) -> None:
        """Shields the child. From here on its failures belong to its supervisor."""
        if self.started or self.closing or self.outer.cancel_called:
            return
        self.started = self.started_once = True
        self.state = State.RUNNING
        self.inner.shield = True
        self._clear_start_deadline()
        self.finish_start()
        self._show(TapKind.STARTED)

    def finish_start(self) -> None:
        """Wakes the tasks that wait for the start."""
        self.start_finished.set()
        self.start_finished = _FINISHED  # an idle child keeps no event

    async def wait_ended(self) -> None:
        """Waits until nothing of the child is left. It is always a checkpoint."""
        if self.alive:
            if self._ended is None:
                self._ended = trio.Event()
            await self._ended.wait()
        else:
            await checkpoint()

    def finish(self) -> None:
        """Records that nothing of the child is left."""
        self.state = State.EXITED
        self.finish_start()
        if self._ended is not None:
            self._ended.set()

    def begin_end(self) -> None:
        """Shields the clean-up, within the budget."""
        if not self.closing:
            self.closing = True
            self._clear_start_deadline()
            self.state = State.STOPPING
            self.inner.shield = True
            self.inner.deadline = min(self.inner.deadline, trio.current_time() + self.shutdown_s)

    def fail(self, error: BaseException | None) -> None:
        """Makes the first failure the reason of the end."""
        if self.reason is None and error is not None:
            expected = self.stop_requested and isinstance(error, Exception)
            self.conclude(Exit(ExitKind.STOPPED if expected else ExitKind.CRASHED, error))

    def conclude(self, reason: Exit) -> None:
        """Sets the reason of the end, and answers all askers with it. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            if self.ref is not None:
                self.ref._mailbox.close(reason)

    def interrupt(self) -> None:
        """Cancels the running part: the handler of an actor, otherwise the whole start, function or supervisor."""
        if self.loop is not None:
            self.loop.cancel()
        elif not self.closing:
            self.outer.cancel()
            self.inner.shield = False

    def request_stop(self) -> None:
        """Begins to stop the child. `wait_ended` waits for the end."""
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
        """Returns a scope for the time between two incarnations. `request_stop` cancels it during a restart."""
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

    def since_start(self) -> float:
        return self.runtime.since_start(self.runtime.clock())

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
        if self.supervisor is not None:
            node |= self.supervisor.statistics()
            node["children"] = [cell.tree() for cell in self.supervisor._children()]
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

    def _clear_start_deadline(self) -> None:
        if self.start_deadline is not None:
            self.start_deadline.cell = None
            self.start_deadline = None

    def _show(self, kind: TapKind, what: object = None) -> None:
        self.runtime.show(kind, self.path, "", what)

    def _exit_of(self, failure: BaseException | None, cancelled: BaseException | None) -> Exit:
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
        return Exit(ExitKind.CRASHED, StartFailed(f"{self.label} ended without calling started()"))

    def _record(self, exit_: Exit) -> None:
        self.exit = exit_
        self.actor = None
        self._clear_start_deadline()
        self._show(TapKind.EXIT, exit_)
        if exit_.kind is ExitKind.STOPPED and exit_.exception is None:
            return
        if self.history is None:
            self.history = deque(maxlen=_HISTORY)
        self.history.append((self.since_start(), str(exit_)))
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
class _StartDeadline:
    """The deadline of one start. It may stay in the heap when it is over, and keeps no objects alive."""

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
