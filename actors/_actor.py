"""An actor, and what one incarnation of it may use.

An incarnation is one task. `on_start`, the handlers, `on_stop` and the closing of `ctx.stack` run in it, in this order.
Its scopes nest like this::

    outer                 cancels a start that takes too long, or that the supervisor no longer wants
      inner               is the shield from the start on; its deadline is the shutdown budget
        [ctx.stack]       may hold scopes and nurseries open that on_start entered
          loop            is cancelled to interrupt a handler

Trio demands that scopes close in the reverse order of their opening. A context manager on the stack may hold a nursery
open, so no new scope may be opened around the closing of the stack, not even for a shield. Therefore the shield and the
budget are `inner`, which is there from the beginning, and `loop` ends before the stack closes.

Child tasks run in the supervisor's nursery, each in a shielded scope of its own. The incarnation counts them and waits
for the last. Rejected: a nursery for each incarnation. It made a start half as dear again, most actors have no child
task, and a failure would cancel `on_stop` too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, ClassVar, TypeVarTuple, final

import trio
from trio.lowlevel import checkpoint

from ._errors import ActorDown
from ._exit import Exit, ExitKind, split_cancelled
from ._mailbox import Deferred
from ._message import Down, Handler, R, Request, handlers_of
from ._timer import Timer

if TYPE_CHECKING:
    from ._cell import Cell
    from ._ref import Ref

Args = TypeVarTuple("Args")
_logger = logging.getLogger("actors")


class Actor:
    """State that one task owns, and handlers that run one at a time.

    `__init__` is pure and runs again for every incarnation. `ctx` exists from `on_start` on. Assign state after the
    last await of a handler: when the handler fails half-way, the incarnation ends, and half-applied state with it.
    """

    #: The number of messages that may wait. Beyond it `tell` raises `MailboxFull`, and `ask` waits for room.
    mailbox: ClassVar[int] = 64

    _handlers: ClassVar[Mapping[type, Handler]] = {}

    ctx: Context

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._handlers = handlers_of(cls)
        if cls.mailbox < 1:
            raise ValueError(f"{cls.__qualname__}.mailbox must be at least 1")

    async def on_start(self) -> None:
        """Makes the incarnation ready. The start waits for it, and fails when it raises."""

    async def on_stop(self) -> None:
        """Runs when the actor is stopped or stops itself, while its child tasks still run.

        It has the child's `shutdown_s`, less a reserve for closing `ctx.stack`. It does not run after a crash: clean-up
        that must always happen belongs on `ctx.stack`.
        """

    def inspect(self) -> Mapping[str, object]:
        """Returns the state that people should see, ready for JSON. `Ref.inspect()` shows it as `actor`."""
        return {}


@final
class TaskHandle:
    """A child task of an incarnation."""

    __slots__ = ("_done", "_scope", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._scope = trio.CancelScope(shield=True)
        self._done = trio.Event()

    @property
    def done(self) -> bool:
        """Whether the task has ended."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Cancels the task. That is no failure, and the actor continues."""
        self._scope.cancel()

    async def wait(self) -> None:
        """Waits until the task has ended, in whatever way."""
        await self._done.wait()


@final
class Context:
    """The context of one incarnation."""

    __slots__ = ("_cell", "_closed", "_idle", "_monitored", "_stack", "_tasks", "_timers")

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._tasks: dict[TaskHandle, None] = {}
        self._timers: dict[Timer, None] = {}
        self._idle: trio.Event | None = None
        self._stack: AsyncExitStack | None = None
        self._monitored: dict[Ref[Any], None] = {}
        self._closed = False

    @property
    def self_ref(self) -> Ref[Any]:
        """The ref of this actor, for others to use."""
        ref = self._cell.ref
        assert ref is not None
        return ref

    @property
    def name(self) -> str:
        """The path in the tree."""
        return self._cell.path

    @property
    def stack(self) -> AsyncExitStack:
        """Closes in reverse at every end of the incarnation: after the child tasks, shielded, within `shutdown_s`.

        Enter a context manager that holds a nursery or a cancel scope open in `on_start` only; elsewhere give it a task
        of its own.
        """
        if self._stack is None:
            self._stack = AsyncExitStack()
        return self._stack

    def spawn(self, fn: Callable[[*Args], Awaitable[object]], *args: *Args, name: str | None = None) -> TaskHandle:
        """Starts a child task of this incarnation. Its failure is a crash of the actor. It may ask its own actor.

        :raises ActorDown: the incarnation is ending.
        """
        if self._closed:
            raise ActorDown(self.name, self._cell.reason or Exit(ExitKind.STOPPED))
        handle = TaskHandle(name or getattr(fn, "__qualname__", None) or repr(fn))
        self._tasks[handle] = None
        self._cell.nursery.start_soon(self._run, handle, fn, args, name=f"{self.name}:{handle.name}")
        return handle

    def send_after(self, delay_s: float, message: object) -> Timer:
        """Puts `message` into this actor's own mailbox after `delay_s` seconds, even a full one.

        The timer ends with the incarnation. For a rhythm, let the handler set it again.

        :raises Unhandled: the actor has no handler for it.
        :raises ValueError: `delay_s` is negative, infinite or NaN.
        :raises ActorDown: the incarnation is ending.
        """
        if not 0 <= delay_s < math.inf:
            raise ValueError(f"delay_s must be at least 0 and finite, not {delay_s}")
        own = self.self_ref._mailbox
        if type(message) not in own.handlers:
            raise own.refusal(message)
        runtime = self._cell.runtime
        timer = Timer(own, message, runtime.clock() + delay_s, self._timers)
        runtime.deadlines.add(timer.at_s, timer)
        return timer

    def monitor(self, ref: Ref[Any]) -> None:
        """Delivers one `Down` when the present incarnation of `ref` has ended; at once when there is none.

        The `Down` overtakes the queue. Call `monitor` again to watch the next incarnation.

        :raises TypeError: this actor has no handler for `Down`.
        """
        own = self.self_ref._mailbox
        if Down not in self._cell.handlers:
            raise TypeError(f"{self.name} monitors {ref.name}, but has no handler for Down")
        target = ref._mailbox
        if target.task is None:
            own.deliver(Down(ref, target.reason))
        else:
            target.watchers[own] = self._monitored
            self._monitored[ref] = None

    def demonitor(self, ref: Ref[Any]) -> None:
        """Ends the effect of `monitor`. A `Down` that was already sent still arrives."""
        self._monitored.pop(ref, None)
        ref._mailbox.watchers.pop(self.self_ref._mailbox, None)

    def defer(self, message: Request[R]) -> Deferred[R]:
        """Returns the means to reply to `message` later. A handler returns it, and passes it to a child task.

        :raises RuntimeError: the handler of `message` does not run now.
        """
        return self.self_ref._mailbox.defer(message)

    def stop(self) -> None:
        """Ends the actor after the current message. The queue is lost."""
        self.self_ref._mailbox.finish()

    async def _run(self, handle: TaskHandle, fn: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
        try:
            with handle._scope:
                await fn(*args)
        except BaseException as exc:
            failure, _ = split_cancelled(exc)
            if failure is None:
                raise
            self._cell.fail(failure)
            self._cell.interrupt()
        finally:
            del self._tasks[handle]
            handle._done.set()
            if self._idle is not None and not self._tasks:
                self._idle.set()

    async def _close(self, exc: BaseException | None) -> None:
        self._closed = True
        for timer in list(self._timers):
            timer.cancel()
        own = self.self_ref._mailbox
        for ref in self._monitored:
            ref._mailbox.watchers.pop(own, None)
        try:
            if self._tasks:
                self._idle = trio.Event()
                for handle in list(self._tasks):
                    handle.cancel()
                await self._idle.wait()
        finally:
            if self._stack is not None:
                await self._close_stack(self._stack, exc)

    async def _wait_for_tasks(self) -> None:
        """Waits, like a nursery, for child tasks that shield themselves for longer than the budget."""
        if self._tasks and self._idle is not None:
            with trio.CancelScope(shield=True):
                await self._idle.wait()

    async def _close_stack(self, stack: AsyncExitStack, exc: BaseException | None) -> None:
        try:
            if exc is None:
                await stack.aclose()
            else:
                await stack.__aexit__(type(exc), exc, exc.__traceback__)
        except BaseException as error:
            if error is exc:
                return
            failure, _ = split_cancelled(error)
            if failure is not None:
                if self._cell.reason is not None:
                    _logger.warning("%s: closing its stack failed too", self.name, exc_info=failure)
                self._cell.fail(failure)
            raise


async def run_incarnation(cell: Cell, actor: Actor) -> None:
    """Runs one incarnation, from `on_start` to the end of its clean-up, inside `cell.outer` and `cell.inner`."""
    assert cell.ref is not None
    mailbox = cell.ref._mailbox
    cell.actor = actor
    cell.handlers = actor._handlers
    mailbox.open(actor._handlers, actor.mailbox)
    ctx = actor.ctx = Context(cell)
    failure: BaseException | None = None
    try:
        await actor.on_start()
        if cell.outer.cancel_called:
            await checkpoint()
        cell.mark_started()
        with trio.CancelScope() as cell.loop:
            await mailbox.handle_messages(actor)
        if cell.reason is None:
            mailbox.close(Exit(ExitKind.STOPPED if cell.stop_requested else ExitKind.NORMAL))
            cell.begin_end()
            await _call_on_stop(cell, actor)
    except BaseException as exc:
        failure = exc
        cell.fail(split_cancelled(exc)[0])
        raise
    finally:
        cell.begin_end()
        try:
            await ctx._close(failure)
        finally:
            await ctx._wait_for_tasks()
            del failure


async def _call_on_stop(cell: Cell, actor: Actor) -> None:
    reserve_s = min(2.0, cell.shutdown_s / 4)
    with trio.CancelScope(deadline=cell.inner.deadline - reserve_s) as scope:
        await actor.on_stop()
    if scope.cancelled_caught:
        _logger.warning("%s: on_stop was cancelled at the end of the shutdown budget", cell.path)
