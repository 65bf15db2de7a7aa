"""The errors of the runtime."""

from __future__ import annotations

import trio

from ._exit import Exit


class ActorError(Exception):
    """Base of the errors of the runtime."""


class ActorDown(ActorError):
    """The target has no incarnation, or its incarnation ended before it answered.

    Whether the message had an effect is unknown: read the state again. `reason.exception` is what ended the target.
    """

    def __init__(self, name: str, reason: Exit) -> None:
        super().__init__(f"{name} is down: {reason}")
        self.name = name
        self.reason = reason


class AskTimeout(ActorError, trio.TooSlowError):
    """No answer within the `timeout_s` of an ask.

    `begun` says whether a handler had begun with the message. If not, the message is withdrawn.
    """

    def __init__(self, name: str, message: str, timeout_s: float, begun: bool) -> None:
        state = "its handler has not answered" if begun else "no handler had begun, and it is withdrawn"
        super().__init__(f"{name} did not answer {message} within {timeout_s:g} s: {state}")
        self.name = name
        self.message = message
        self.timeout_s = timeout_s
        self.begun = begun


class MailboxFull(ActorError):
    """The target's mailbox has no room for a `tell`. The message is not in it."""

    def __init__(self, name: str, capacity: int) -> None:
        super().__init__(f"the mailbox of {name} is full ({capacity} messages)")
        self.name = name
        self.capacity = capacity


class SelfAsk(ActorError):
    """An actor asked itself from the task that has to answer, and would wait forever."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} asked itself: call the method, or ask from a task of `ctx.spawn`")
        self.name = name


class Unhandled(ActorError, TypeError):
    """The target has no handler for a message of that type. The sender gets the error, as the mistake is its own."""


class StartFailed(ActorError):
    """A child ended without an exception, before it had called `started()`."""


class StartTimeout(StartFailed, trio.TooSlowError):
    """A child has not started within its `start_timeout_s`."""


class TooManyRestarts(ActorError):
    """A child crashed more often than the restart intensity allows, and its supervisor has given up."""

    def __init__(self, name: str, intensity: int, period_s: float, reason: Exit) -> None:
        super().__init__(f"{name}: more than {intensity} restarts in {period_s:g} s; the last reason: {reason}")
        self.name = name
        self.reason = reason


class NameTaken(ActorError, ValueError):
    """A child of this supervisor has that name already."""


class NoSuchChild(ActorError, LookupError):
    """No child has that name."""


class Fenced(ActorError):
    """The caller belongs to a killed incarnation. The call had no effect."""
