"""The bounded mailbox, and the one loop that empties it.

A Trio memory channel costs two checkpoints a message. Here a `tell` appends to a deque and wakes the actor only if it
sleeps, and the actor takes message after message without a checkpoint of its own, so that a burst costs what the
handlers cost. It would then starve every other task: after `BURST` messages it yields once.

An `ask` parks its task on an object that is the queue's entry and the reply's slot in one; no channel, event or
nursery is made for it. Three things follow from the asker's being parked:

- When the mailbox is full the entry waits in `overflow`. It needs no bound of its own, as each entry is a task that
  stands still. Only tells can be refused.
- An asker that leaves (deadline, cancellation) before a handler took its message up withdraws it. So work that
  nobody waits for any more is not begun, and `AskTimeout.begun` is exact.
- A reply finds a parked task or none. It can never arrive as a message.

Rejected: one queue for each sender (fair, but then the order between two messages of two senders that synchronise
outside is lost); dropping the oldest (loses messages without a word).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic

from trio.lowlevel import Abort, Task, checkpoint, current_task, reschedule, wait_task_rescheduled

from ._errors import ActorDown, AskTimeout, MailboxFull, Unhandled
from ._exit import Exit, ExitKind, flatten
from ._fence import check_fence
from ._message import Down, Handler, R, Request

if TYPE_CHECKING:
    from ._deadlines import Deadlines
    from ._ref import Ref

BURST = 32
"""Messages handled between two checkpoints of the loop."""
RECENT = 16
"""Types of messages remembered for people who look inside."""
_NONE: Mapping[type, Handler] = {}


class Ask:
    """A question in the queue and the slot for its answer. `task` is None once nobody waits for it."""

    __slots__ = ("begun", "error", "mailbox", "message", "task", "timeout_s", "value")

    def __init__(self, mailbox: Mailbox, message: Request[Any], task: Task, timeout_s: float) -> None:
        self.mailbox = mailbox
        self.message = message
        self.timeout_s = timeout_s
        self.task: Task | None = task
        self.begun = False
        self.value: Any = None
        self.error: BaseException | None = None

    async def wait(self) -> Any:
        await wait_task_rescheduled(self._leave)
        if self.error is not None:
            raise self.error
        return self.value

    def reply(self, value: Any) -> None:
        task = self.task
        if task is None:
            self.mailbox.late_replies += 1
            return
        self.task = None
        self.value = value
        reschedule(task)

    def fail(self, error: BaseException) -> None:
        task = self.task
        if task is None:
            self.mailbox.late_replies += 1
            return
        self.task = None
        self.error = error
        reschedule(task)

    def expire(self) -> None:
        task = self.task
        if task is not None:
            self._withdraw()
            kind = type(self.message).__qualname__
            self.error = AskTimeout(self.mailbox.name, kind, self.timeout_s, self.begun)
            reschedule(task)

    def _leave(self, _: object) -> Abort:
        self._withdraw()
        return Abort.SUCCEEDED

    def _withdraw(self) -> None:
        self.task = None
        self.mailbox.overflow.pop(self, None)
        self.mailbox.deferred.pop(self, None)


class Deferred(Generic[R]):
    """A reply that is still owed. The first answer counts, and one that comes too late is dropped.

    When the incarnation that owes it dies, the asker gets `ActorDown`.
    """

    __slots__ = ("_ask", "_mailbox")

    def __init__(self, mailbox: Mailbox, ask: Ask | None) -> None:
        self._mailbox = mailbox
        self._ask = ask

    def reply(self, value: R) -> None:
        """Answers the asker.

        :raises Fenced: see `check_fence`.
        """
        check_fence()
        ask = self._take()
        if ask is not None:
            ask.reply(value)

    def fail(self, error: Exception) -> None:
        """Raises `error` in the asker.

        :raises Fenced: see `check_fence`.
        """
        check_fence()
        ask = self._take()
        if ask is not None:
            ask.fail(error)

    def _take(self) -> Ask | None:
        ask, self._ask = self._ask, None
        if ask is not None:
            self._mailbox.deferred.pop(ask, None)
        return ask


class Mailbox:
    """Stable over the restarts of its actor; open while an incarnation takes messages."""

    __slots__ = (
        "_waiter",
        "capacity",
        "current",
        "deadlines",
        "deferred",
        "ending",
        "handled",
        "handlers",
        "handling",
        "high_water",
        "late_replies",
        "lost",
        "overflow",
        "queue",
        "reason",
        "recent",
        "ref",
        "refused",
        "rejected",
        "system",
        "task",
        "watchers",
    )

    deadlines: Deadlines

    def __init__(self, ref: Ref[Any]) -> None:
        self.ref = ref
        self.capacity = 0
        self.handlers = _NONE
        self.queue: deque[Any] = deque()
        self.overflow: dict[Ask, None] = {}
        self.system: list[Down] = []
        self.deferred: dict[Ask, None] = {}
        self.current: Ask | None = None
        self.handling: object = None
        self.watchers: dict[Mailbox, dict[Ref[Any], None]] = {}
        self.task: Task | None = None
        self.reason = Exit(ExitKind.UNBORN)
        self.ending = False
        self.recent: deque[type] = deque(maxlen=RECENT)
        self.handled = self.high_water = self.late_replies = self.lost = self.refused = self.rejected = 0
        self._waiter: Task | None = None

    @property
    def name(self) -> str:
        return self.ref.name

    def open(self, handlers: Mapping[type, Handler], capacity: int, deadlines: Deadlines) -> None:
        self.handlers = handlers
        self.deadlines = deadlines
        self.capacity = capacity
        self.task = current_task()
        self.ending = False

    def close(self, reason: Exit, *, keep_tells: bool = False) -> None:
        """Takes no more messages, and answers everybody who waits for an answer. The first reason stays."""
        if self.handlers is _NONE:
            return
        self.handlers = _NONE
        self.reason = reason
        self.ending = True
        waiting: list[Ask] = [] if self.current is None else [self.current]
        waiting += self.deferred
        tells = []
        for entry in self.queue:
            if type(entry) is Ask:
                waiting.append(entry)
            else:
                tells.append(entry)
        waiting += self.overflow
        self.queue.clear()
        self.overflow.clear()
        self.deferred.clear()
        self.system.clear()
        self.current = self.handling = None
        if keep_tells:
            self.queue.extend(tells)
        else:
            self.lost += len(tells)
        for ask in waiting:
            if ask.task is not None:
                ask.fail(self.down())

    def end(self, reason: Exit) -> None:
        """The incarnation is over and cleaned up: its watchers are told, once."""
        self.close(reason)
        self.reason = reason
        self.task = None
        watchers, self.watchers = self.watchers, {}
        for watcher, monitored in watchers.items():
            monitored.pop(self.ref, None)
            watcher.deliver(Down(self.ref, reason))

    def abandon(self, reason: Exit) -> None:
        """There will be no further incarnation that could find what a former one left."""
        self.end(reason)
        self.lost += len(self.queue)
        self.queue.clear()

    def down(self) -> ActorDown:
        error = ActorDown(self.name, self.reason)
        error.__cause__ = self.reason.exception
        return error

    def refusal(self, message: object) -> Exception:
        """Why `message`, for which there is no handler, is not taken."""
        if self.handlers is _NONE:
            return self.down()
        return Unhandled(f"{self.name} has no handler for {type(message).__qualname__}")

    def tell(self, message: object) -> None:
        if type(message) not in self.handlers:
            raise self.refusal(message)
        queue = self.queue
        if len(queue) >= self.capacity:
            self.rejected += 1
            raise MailboxFull(self.name, self.capacity)
        queue.append(message)
        if self._waiter is not None:
            self._wake()

    def put(self, ask: Ask) -> None:
        if len(self.queue) < self.capacity:
            self.queue.append(ask)
        else:
            self.overflow[ask] = None
        if self._waiter is not None:
            self._wake()

    def deliver(self, message: Down) -> None:
        """The system lane: ahead of the queue, and never refused. It holds at most one message per monitor."""
        if type(message) in self.handlers:
            self.system.append(message)
            self._wake()

    def finish(self) -> None:
        """Ends the loop after the message that is being handled."""
        self.ending = True
        self._wake()

    async def drain(self, actor: object) -> None:
        """Handles messages until `finish()`; what a handler raises, unless its request declares it, comes out."""
        queue, system, overflow = self.queue, self.system, self.overflow
        burst = 0
        while not self.ending:
            if not queue and not system:
                burst = 0
                await self._park()
                continue
            burst += 1
            if burst > BURST:
                burst = 1
                await checkpoint()
                continue
            if system:
                message: Any = system.pop(0)
                ask = None
            else:
                depth = len(queue)
                if depth > self.high_water:
                    self.high_water = depth
                message = queue.popleft()
                if overflow:
                    queue.append(_first(overflow))
                ask = None
                if type(message) is Ask:
                    if message.task is None:
                        continue
                    ask = message
                    ask.begun = True
                    message = ask.message
            self.current = ask
            self.handling = message
            kind = type(message)
            self.recent.append(kind)
            self.handled += 1
            try:
                result = await self.handlers[kind](actor, message)
            except Exception as exc:
                error = flatten(exc)
                if error is None or not isinstance(error, getattr(message, "raises", ())):
                    raise
                self.refused += 1
                if ask is not None:
                    ask.fail(error)
            else:
                if ask is not None:
                    if type(result) is not Deferred:
                        self.deferred.pop(ask, None)
                        ask.reply(result)
                    elif ask.task is not None and ask not in self.deferred:
                        raise TypeError(f"the handler of {kind.__qualname__} returned another message's Deferred")
            self.current = self.handling = None

    def defer(self, message: Request[R]) -> Deferred[R]:
        if message is not self.handling:
            raise RuntimeError("defer() takes the message that is being handled, in its handler")
        ask = self.current
        if ask is not None and ask.task is not None:
            self.deferred[ask] = None
        return Deferred(self, ask)

    def statistics(self) -> dict[str, Any]:
        return {
            "depth": len(self.queue),
            "capacity": self.capacity,
            "askers_waiting_for_room": len(self.overflow),
            "replies_owed": len(self.deferred),
            "high_water": self.high_water,
            "handled": self.handled,
            "rejected": self.rejected,
            "refused": self.refused,
            "lost": self.lost,
            "late_replies": self.late_replies,
        }

    async def _park(self) -> None:
        self._waiter = current_task()
        await wait_task_rescheduled(self._unpark)

    def _unpark(self, _: object) -> Abort:
        self._waiter = None
        return Abort.SUCCEEDED

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            reschedule(waiter)


def _first(entries: dict[Ask, None]) -> Ask:
    ask = next(iter(entries))
    del entries[ask]
    return ask


def names(kinds: Iterable[type]) -> list[str]:
    return [kind.__qualname__ for kind in kinds]
