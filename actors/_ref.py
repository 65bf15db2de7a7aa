"""The address of an actor.

`tell` and `ask` are the hot paths of the runtime, so they write to the mailbox themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from trio.lowlevel import checkpoint, current_task, wait_task_rescheduled

from ._errors import SelfAsk
from ._fence import current_fence
from ._mailbox import Ask, Mailbox
from ._message import R, Request
from ._tap import TapKind

if TYPE_CHECKING:
    from ._actor import Actor
    from ._cell import Cell

A_co = TypeVar("A_co", bound="Actor", covariant=True)


@final
class Ref(Generic[A_co]):
    """The address of one actor. It stays the same over restarts, and an actor has only one.

    It has no public constructor: use `Child.ref`, `ctx.self_ref`, or the ref that `start_child` returns.
    """

    __slots__ = ("__weakref__", "_cell", "_mailbox")

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._mailbox = Mailbox(self)

    @property
    def name(self) -> str:
        """The path in the tree, such as `vms/demo`."""
        return self._cell.path

    def tell(self, message: object, /) -> None:
        """Puts a message into the mailbox and returns. The sender does not learn whether it is handled.

        :raises MailboxFull: the mailbox has no room.
        :raises ActorDown: the actor has no incarnation now.
        :raises Unhandled: the actor has no handler for it.
        :raises Fenced: the caller counts as killed; see `check_fence`.
        """
        sender = current_fence.get().name
        mailbox = self._mailbox
        queue = mailbox.queue
        if type(message) not in mailbox.handlers or len(queue) >= mailbox.capacity:
            raise mailbox.refuse(message, sender)
        queue.append((mailbox.clock(), message, sender))
        if mailbox.tap is not None:
            mailbox.show(TapKind.TELL, sender, message)
        if mailbox._waiter is not None:
            mailbox.wake()

    async def ask(self, message: Request[R], /, *, timeout_s: float = math.inf) -> R:
        """Sends a request and waits for its reply; when the mailbox is full, first for room.

        The caller's cancel scope bounds the wait, as it bounds any other (`trio.fail_after`). Or give this one ask a
        deadline of its own: `timeout_s` costs less than a scope, and its error says whether a handler had begun. Use
        one of the two. Either way a request that no handler has begun is withdrawn.

        :raises AskTimeout: no reply within `timeout_s` seconds.
        :raises ActorDown: the actor has no incarnation, or its incarnation ended before it replied.
        :raises SelfAsk: an actor asked itself from its own handler.
        :raises Unhandled: the actor has no handler for it.
        :raises Fenced: the caller counts as killed; see `check_fence`.

        Besides, the exceptions that the request declares in `raises`, and those of `Deferred.fail`.
        """
        sender = current_fence.get().name
        mailbox = self._mailbox
        task = current_task()
        if task is mailbox.task:
            raise SelfAsk(self.name)
        if type(message) not in mailbox.handlers:
            refusal = mailbox.refusal(message)
            await checkpoint()
            raise refusal
        now_s = mailbox.clock()
        ask = Ask(mailbox, message, task, timeout_s, now_s, sender)
        if len(mailbox.queue) < mailbox.capacity:
            mailbox.queue.append(ask)
        else:
            mailbox.overflow[ask] = None
        if mailbox.tap is not None:
            mailbox.show(TapKind.ASK, sender, message)
        if mailbox._waiter is not None:
            mailbox.wake()
        if timeout_s != math.inf:
            runtime = mailbox.runtime
            assert runtime is not None
            runtime.deadlines.add(now_s + timeout_s, ask)
        await wait_task_rescheduled(ask.leave)
        if ask.error is not None:
            try:
                raise ask.error
            finally:
                ask.error = None  # its traceback refers to this frame, and so to itself
        reply: R = ask.value
        ask.value = ask.message = None  # the heap of deadlines keeps the ask for a while
        return reply

    def inspect(self) -> dict[str, Any]:
        """Returns the state of the actor, ready for JSON: see docs/reference/actors.md."""
        return self._cell.inspect()

    def __repr__(self) -> str:
        return f"<Ref {self.name} ({self._cell.state})>"
