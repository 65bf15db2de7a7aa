"""The bounded mailbox, and the loop that empties it.

A Trio memory channel costs two checkpoints a message. Here a `tell` appends to a deque and wakes the actor only if it
sleeps, and the actor handles message after message without a checkpoint of its own. So as not to starve other tasks, it
yields once after `BURST` messages or `BURST_S`. On virtual time the clock does not advance, so only the number counts.

An `ask` parks its task on an object that is both the queue's entry and the slot of the reply, without a channel, event
or nursery. Three things follow:

- When the mailbox is full, the entry waits in `overflow`. That needs no bound, as each entry is a task that waits. Only
  tells can be refused.
- An asker that leaves (deadline, cancellation) before a handler has begun withdraws its message. So no handler begins
  work that nobody waits for, and `AskTimeout.begun` is exact.
- A reply finds a parked task or none. It never arrives as a message.

Each entry carries its time of arrival and its sender, for `inspect` and traces. An actor remembers handled messages by
type alone, never by content: contents would keep payloads alive and show secrets to everybody who may look.

Rejected: one queue for each sender (fair, but loses the order of messages from two senders that synchronise elsewhere);
dropping the oldest message (loses it silently).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, final

from trio.lowlevel import Abort, Task, checkpoint, current_task, reschedule, wait_task_rescheduled

from ._errors import ActorDown, AskTimeout, MailboxFull, Unhandled
from ._exit import Exit, ExitKind
from ._message import Down, Handler, R, Request
from ._tap import TapKind
from ._timer import Timer

if TYPE_CHECKING:
    from ._ref import Ref
    from ._runtime import Runtime
    from ._tap import Tap

BURST: Final = 256
"""Maximum messages between two checkpoints of the loop."""
BURST_S: Final = 0.0005
"""Maximum seconds between two checkpoints of the loop, unless one handler takes longer."""
RECENT: Final = 100
"""Number of messages that `System.trace` shows."""
_NONE: Mapping[type, Handler] = {}
_NOT_STARTED: Final = Exit(ExitKind.NOT_STARTED)


class Ask:
    """A request in the queue, and the slot for its reply. `task` is None once no task waits for it."""

    __slots__ = ("at_s", "begun", "error", "mailbox", "message", "sender", "task", "timeout_s", "value")

    def __init__(
        self, mailbox: Mailbox, message: Request[Any], task: Task, timeout_s: float, at_s: float, sender: str
    ) -> None:
        self.mailbox = mailbox
        self.message: Any = message
        self.task: Task | None = task
        self.timeout_s = timeout_s
        self.at_s = at_s
        self.sender = sender
        self.begun = False
        self.value: Any = None
        self.error: BaseException | None = None

    def reply(self, value: Any) -> None:
        task = self.task
        if task is None:
            self.mailbox.reply_too_late(self)
            return
        self.task = None
        self.value = value
        if self.mailbox.tap is not None:
            self.mailbox.show(TapKind.REPLY, self.sender, value)
        reschedule(task)

    def fail(self, error: BaseException) -> None:
        task = self.task
        if task is None:
            self.mailbox.reply_too_late(self)
            return
        self.task = None
        self.error = error
        if self.mailbox.tap is not None:
            self.mailbox.show(TapKind.REFUSE, self.sender, error)
        reschedule(task)

    def take(self) -> object:
        """Returns the message for its handler; None if no task waits for the reply."""
        if self.task is None:
            return None
        self.begun = True
        return self.message

    def over(self) -> bool:
        return self.task is None

    def expire(self) -> None:
        if self.task is not None:
            kind = type(self.message).__qualname__
            error = AskTimeout(self.mailbox.name, kind, self.timeout_s, self.begun)
            task = self.task
            self._withdraw()
            self.error = error
            if self.mailbox.tap is not None:
                self.mailbox.show(TapKind.REFUSE, self.sender, error)
            reschedule(task)

    def leave(self, _: object) -> Abort:
        self._withdraw()
        return Abort.SUCCEEDED

    def _withdraw(self) -> None:
        self.task = None
        self.mailbox.overflow.pop(self, None)
        self.mailbox.deferred.pop(self, None)


@final
class Deferred(Generic[R]):
    """Sends a reply later. The first reply counts; a reply without an asker is dropped.

    When the incarnation ends first, the asker gets `ActorDown`.
    """

    __slots__ = ("_ask", "_mailbox")

    def __init__(self, mailbox: Mailbox, ask: Ask | None) -> None:
        self._mailbox = mailbox
        self._ask = ask

    def reply(self, value: R) -> None:
        """Sends the reply."""
        ask = self._take()
        if ask is not None:
            ask.reply(value)

    def fail(self, error: Exception) -> None:
        """Raises `error` in the asker."""
        ask = self._take()
        if ask is not None:
            ask.fail(error)

    def _take(self) -> Ask | None:
        ask, self._ask = self._ask, None
        if ask is not None:
            self._mailbox.deferred.pop(ask, None)
        return ask


class HandlerTimes:
    """A handler and how long it took, in seconds with its waits, over all incarnations."""

    __slots__ = ("count", "handler", "max_s", "total_s")

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.count = 0
        self.total_s = self.max_s = 0.0


class Mailbox:
    """The mailbox of an actor. It outlives incarnations, and is open while one takes messages."""

    __slots__ = (
        "_waiter",
        "began_s",
        "capacity",
        "clock",
        "deferred",
        "ending",
        "entry",
        "handlers",
        "late_replies",
        "lost",
        "overflow",
        "queue",
        "reason",
        "recent",
        "ref",
        "refused",
        "rejected",
        "runtime",
        "system",
        "tap",
        "task",
        "times",
        "watchers",
    )

    clock: Callable[[], float]

    def __init__(self, ref: Ref[Any]) -> None:
        self.ref = ref
        self.runtime: Runtime | None = None
        self.tap: Tap | None = None
        self.capacity = 0
        self.handlers = _NONE
        self.queue: deque[Any] = deque()
        self.overflow: dict[Ask, None] = {}
        self.system: list[tuple[float, Any, str]] = []
        self.deferred: dict[Ask, None] = {}
        self.entry: Any = None
        self.began_s = 0.0
        self.watchers: dict[Mailbox, dict[Ref[Any], None]] = {}
        self.task: Task | None = None
        self.reason = _NOT_STARTED
        self.ending = False
        self.recent: deque[tuple[float, float, float, type, str, str]] | None = None
        self.times: dict[type, HandlerTimes] = {}
        self.late_replies = self.lost = self.refused = self.rejected = 0
        self._waiter: Task | None = None

    @property
    def name(self) -> str:
        return self.ref.name

    def attach(self, runtime: Runtime) -> None:
        """Makes it part of a system. A trace of another system has the times of another clock."""
        if runtime is not self.runtime:
            self.recent = None
        self.runtime = runtime
        self.clock = runtime.clock
        self.tap = runtime.tap

    def open(self, handlers: Mapping[type, Handler], capacity: int) -> None:
        for kind, times in self.times.items():
            times.handler = handlers.get(kind, times.handler)
        self.handlers = handlers
        self.capacity = capacity
        self.task = current_task()
        self.ending = False

    def close(self, reason: Exit) -> None:
        """Takes no more messages, and fails all asks. The first reason stays."""
        if self.handlers is _NONE:
            return
        self.handlers = _NONE
        self.reason = reason
        self.ending = True
        waiting: list[Ask] = [self.entry] if type(self.entry) is Ask else []
        waiting += self.deferred
        tells = []
        for entry in self.queue:
            if type(entry) is Ask:
                waiting.append(entry)
            elif type(entry) is tuple:
                tells.append(entry)
        waiting += self.overflow
        self.queue.clear()
        self.overflow.clear()
        self.deferred.clear()
        self.system.clear()
        self.entry = None
        self.lost += len(tells)
        if self.runtime is not None:
            for _, message, sender in tells:
                self.runtime.dead_letter(self.name, message, sender, "lost at the end")
        for ask in waiting:
            if ask.task is not None:
                ask.fail(self.down())

    def end(self, reason: Exit) -> None:
        """Records that the incarnation is cleaned up, and notifies its monitors."""
        self.close(reason)
        self.reason = reason
        self.task = None
        watchers, self.watchers = self.watchers, {}
        for watcher, monitored in watchers.items():
            monitored.pop(self.ref, None)
            watcher.deliver(Down(self.ref, reason))

    def down(self) -> ActorDown:
        error = ActorDown(self.name, self.reason)
        error.__cause__ = self.reason.exception
        return error

    def refusal(self, message: object) -> Exception:
        """Returns why a message without a handler is refused."""
        if self.handlers is _NONE:
            return self.down()
        return Unhandled(f"{self.name} has no handler for {type(message).__qualname__}")

    def refuse(self, message: object, sender: str) -> Exception:
        """Returns why a tell is refused: no incarnation, no handler, no room."""
        if type(message) in self.handlers:
            self.rejected += 1
            return MailboxFull(self.name, self.capacity)
        if self.handlers is _NONE and self.runtime is not None:
            self.runtime.dead_letter(self.name, message, sender, "told while down")
        return self.refusal(message)

    def deliver(self, message: Down) -> None:
        """Delivers a message ahead of the queue. It is never refused, and there is at most one for each monitor."""
        if type(message) in self.handlers:
            self.system.append((self.clock(), message, message.ref.name))
            if self.tap is not None:
                self.show(TapKind.DOWN, message.ref.name, message)
            self.wake()

    def deliver_timer(self, timer: Timer) -> None:
        """Delivers the message of a timer. It is never refused, since the actor itself has set it."""
        self.queue.append(timer)
        if self.tap is not None:
            self.show(TapKind.TIMER, self.name, timer.message)
        self.wake()

    def finish(self) -> None:
        """Ends the loop after the current message."""
        self.ending = True
        self.wake()

    def reply_too_late(self, ask: Ask) -> None:
        """Records a reply that came after its asker had left."""
        self.late_replies += 1
        if self.runtime is not None:
            self.runtime.dead_letter(self.name, ask.message, ask.sender, "answered too late")

    def show(self, kind: TapKind, sender: str, what: object) -> None:
        """Calls the tap, if there is one."""
        if self.runtime is not None:
            self.runtime.show(kind, self.name, sender, what)

    async def handle_messages(self, actor: object) -> None:
        """Handles messages until `finish()`, and raises the errors of handlers that their requests do not declare."""
        queue, system, overflow, deferred, known = self.queue, self.system, self.overflow, self.deferred, self.times
        clock, tap, recent = self.clock, self.tap, self.recent
        entry: Any
        message: Any
        result: Any
        ask: Ask | None
        left = 0
        now_s = pause_s = -math.inf
        while not self.ending:
            if not left or now_s > pause_s or not (queue or system):
                self.entry = None
                if queue or system:
                    await checkpoint()
                else:
                    entry = message = result = ask = None  # an idle actor keeps nothing of the last message alive
                    self._waiter = current_task()
                    await wait_task_rescheduled(self._unpark)
                left = BURST
                now_s = clock()
                pause_s = now_s + BURST_S
                continue
            left -= 1
            if system:
                entry = system.pop(0)
            else:
                entry = queue.popleft()
                if overflow:
                    queue.append(_first(overflow))
            if type(entry) is tuple:
                at_s, message, sender = entry
                ask = None
            else:
                message = entry.take()
                if message is None:
                    continue
                at_s, sender = entry.at_s, entry.sender
                ask = entry if type(entry) is Ask else None
            kind = type(message)
            try:
                times = known[kind]
            except KeyError:
                times = known[kind] = HandlerTimes(self.handlers[kind])
            self.entry = entry
            self.began_s = began_s = now_s
            if tap is not None:
                self.show(TapKind.HANDLE, sender, message)
            outcome = "interrupted"
            try:
                result = await times.handler(actor, message)
                outcome = "handled"
            except Exception as exc:
                outcome = "crashed"
                if not isinstance(exc, getattr(message, "raises", ())):
                    raise
                outcome = "refused"
                self.refused += 1
                if ask is not None:
                    deferred.pop(ask, None)
                    ask.fail(exc)
            else:
                if ask is not None:
                    if type(result) is not Deferred:
                        if deferred:
                            deferred.pop(ask, None)
                        ask.reply(result)
                    elif ask.task is not None and ask not in deferred:
                        raise TypeError(f"the handler of {kind.__qualname__} returned another message's Deferred")
                    else:
                        outcome = "deferred"
            finally:
                now_s = clock()
                took_s = now_s - began_s
                times.count += 1
                times.total_s += took_s
                if took_s > times.max_s:
                    times.max_s = took_s
                if recent is None:
                    recent = self.recent = deque(maxlen=RECENT)
                recent.append((at_s, began_s, now_s, kind, sender, outcome))

    def defer(self, message: Request[R]) -> Deferred[R]:
        if self.entry is None or message is not self._handling():
            raise RuntimeError("defer() takes the message that is being handled, in its handler")
        ask = self.entry if type(self.entry) is Ask else None
        if ask is not None and ask.task is not None:
            self.deferred[ask] = None
        return Deferred(self, ask)

    def oldest_s(self) -> float | None:
        """Returns the age of the oldest waiting message, in seconds; None if none waits."""
        for entry in self.queue:
            if type(entry) is tuple:
                return self._age_s(entry[0])
            if not entry.over():
                return self._age_s(entry.at_s)
        return None

    def statistics(self) -> dict[str, Any]:
        return {
            "depth": len(self.queue),
            "capacity": self.capacity,
            "oldest_s": self.oldest_s(),
            "askers_waiting_for_room": len(self.overflow),
            "replies_owed": len(self.deferred),
            "handled": sum(times.count for times in self.times.values()),
            "rejected": self.rejected,
            "refused": self.refused,
            "lost": self.lost,
            "late_replies": self.late_replies,
        }

    def activity(self) -> dict[str, Any]:
        """Returns the message that is being handled, and the times of all handlers."""
        handling = self._handling()
        return {
            "handling": None
            if handling is None
            else {"message": type(handling).__qualname__, "for_s": self._age_s(self.began_s)},
            "handlers": {
                kind.__qualname__: {
                    "count": times.count,
                    "total_s": round(times.total_s, 6),
                    "max_s": round(times.max_s, 6),
                }
                for kind, times in self.times.items()
            },
        }

    def trace(self, last: int) -> list[dict[str, Any]]:
        """Returns the last messages, the oldest first."""
        runtime = self.runtime
        if runtime is None or self.recent is None:
            return []
        return [
            {
                "at_s": runtime.since_start(at_s),
                "message": kind.__qualname__,
                "from": sender,
                "waited_s": round(began_s - at_s, 6),
                "took_s": round(ended_s - began_s, 6),
                "outcome": outcome,
            }
            for at_s, began_s, ended_s, kind, sender, outcome in islice(
                self.recent, max(0, len(self.recent) - last), None
            )
        ]

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            reschedule(waiter)

    def _handling(self) -> object:
        entry = self.entry
        return entry[1] if type(entry) is tuple else None if entry is None else entry.message

    def _age_s(self, at_s: float) -> float:
        return round(max(0.0, self.clock() - at_s), 6)

    def _unpark(self, _: object) -> Abort:
        self._waiter = None
        return Abort.SUCCEEDED


def _first(entries: dict[Ask, None]) -> Ask:
    ask = next(iter(entries))
    del entries[ask]
    return ask
