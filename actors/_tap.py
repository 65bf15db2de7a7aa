"""A tap sees everything that happens in a system, in order: for traces of tests, and for people who debug.

It is called from within the runtime, synchronously, so what it sees is what happened, in the order in which it did.
Without a tap each place costs one comparison with None.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple, TypeAlias


class TapKind(enum.StrEnum):
    """What happened. The words in brackets say what `TapEvent.what` is."""

    STARTING = "starting"
    """An incarnation begins [None]."""
    STARTED = "started"
    """It has started [None]."""
    EXIT = "exit"
    """It is over and cleaned up [`Exit`]."""
    TELL = "tell"
    """A message has been put into the mailbox [the message]."""
    ASK = "ask"
    """A request has been put into the mailbox, or its asker waits for room [the message]."""
    TIMER = "timer"
    """A timer is due, and its message has been put into the mailbox [the message]."""
    DOWN = "down"
    """A monitor's message has been put into the system lane [`Down`]."""
    HANDLE = "handle"
    """A handler begins [the message]."""
    REPLY = "reply"
    """An asker has been answered [the value]."""
    REFUSE = "refuse"
    """An asker has been answered with an exception [the exception]."""
    DEAD_LETTER = "dead letter"
    """A message that nobody will handle, or a reply that nobody waits for any more [the message it is about]."""


class TapEvent(NamedTuple):
    """One thing that happened: when, to whom, and who did it.

    `at_s` is Trio's time, `name` the path of the actor, `sender` that of the incarnation whose task sent the message
    ("" outside of the system).
    """

    at_s: float
    kind: TapKind
    name: str
    sender: str
    what: object


Tap: TypeAlias = Callable[[TapEvent], None]
"""Must return at once and must not raise; what it raises is the failure of whatever happened."""

ambient_tap: ContextVar[Tap | None] = ContextVar("actors.tap", default=None)
"""The tap of every system that is opened from here on and is given none of its own."""
