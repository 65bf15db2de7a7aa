"""What the runtime raises."""

from __future__ import annotations

import trio

from ._exit import Exit


class ActorError(Exception):
    """Base of what the runtime raises."""


class ActorDown(ActorError):
    """The target has no living incarnation, or it died, restarted or stopped before it answered.

    Whether the message had an effect is unknown: read the state again and go on from there.
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
        state = "its handler has not answered" if begun else "it was not taken up, and is withdrawn"
        super().__init__(f"{name} did not answer {message} within {timeout_s:g} s: {state}")
        self.name = name
        self.message = message
        self.timeout_s = timeout_s
        self.begun = begun


class MailboxFull(ActorError):
    """The target's mailbox has no room for a `tell`. The message was not taken."""

    def __init__(self, name: str, capacity: int) -> None:
        super().__init__(f"the mailbox of {name} is full ({capacity} messages)")
        self.name = name
        self.capacity = capacity


class SelfAsk(ActorError):
    """An actor asked itself from the task that has to answer, and would wait for ever."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} asked itself: call the method, or ask from a task of `ctx.spawn`")
        self.name = name


class Unhandled(ActorError, TypeError):
    """A message of a type for which the target has no handler. The fault is the sender's, so the sender gets it."""


class StartFailed(ActorError):
    """A child ended, without an exception of its own, before it had said that it started."""


class StartTimeout(StartFailed, trio.TooSlowError):
    """A child has not started within its `start_timeout_s`."""


class TooManyRestarts(ActorError):
    """A child crashed more often than the restart intensity allows; its supervisor has given up."""

    def __init__(self, name: str, intensity: int, period_s: float, reason: Exit) -> None:
        super().__init__(f"{name}: more than {intensity} restarts in {period_s:g} s; the last reason: {reason}")
        self.name = name
        self.reason = reason


class NameTaken(ActorError, ValueError):
    """A living child of this supervisor has that name already."""


class NoSuchChild(ActorError, LookupError):
    """No child has that name."""


class Fenced(ActorError):
    """The caller belongs to a killed incarnation. The call had no effect."""
