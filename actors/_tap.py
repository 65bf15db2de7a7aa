"""Hooks for tests and debugging: taps, and places where a simulation injects faults.

A tap is called with everything that happens in a system.

The runtime calls it synchronously, so it sees events in the order in which they happen. Without a tap each place costs
one comparison with None.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple, TypeAlias

# Named places where a simulation may inject a fault.
#
# A program names the place (`fault("journal.commit")`), and a simulation decides whether it fails. Elsewhere the call
# costs the look-up of a context variable, so production code may contain it.


current_faults: ContextVar[Callable[[str], bool] | None] = ContextVar("actors.faults", default=None)
"""Decides about faults for this task and all tasks that it starts; None outside of a simulation."""


def fault(site: str) -> bool:
    """Raises the simulation's planned error for `site`, or returns whether it fires. Call it before the action.

    True means: behave as if the action had failed, came late or stopped half-way. Outside of a simulation it is always
    False.
    """
    decide = current_faults.get()
    return decide is not None and decide(site)


class TapKind(enum.StrEnum):
    """The kind of an event. Brackets say what `TapEvent.what` is."""

    STARTING = "starting"
    """An incarnation begins [None]."""
    STARTED = "started"
    """It has started [None]."""
    EXIT = "exit"
    """It is over and cleaned up [`Exit`]."""
    TELL = "tell"
    """A message is in the mailbox [the message]."""
    ASK = "ask"
    """A request is in the mailbox, or its asker waits for room [the message]."""
    TIMER = "timer"
    """A timer is due, and its message is in the mailbox [the message]."""
    DOWN = "down"
    """The message of a monitor is on its way, ahead of the queue [`Down`]."""
    HANDLE = "handle"
    """A handler begins [the message]."""
    REPLY = "reply"
    """An asker gets its answer [the value]."""
    REFUSE = "refuse"
    """An asker gets an exception [the exception]."""
    DEAD_LETTER = "dead letter"
    """A message will not be handled, or a reply has no asker any more [the message]."""


class TapEvent(NamedTuple):
    """Holds one event.

    `at_s` is a time of Trio's clock, `name` the path of the actor, `sender` the path of the incarnation whose task sent
    the message ("" outside of the system).
    """

    at_s: float
    kind: TapKind
    name: str
    sender: str
    what: object


Tap: TypeAlias = Callable[[TapEvent], None]
"""A callback for events. It must return at once and must not raise: an error fails the event itself."""

ambient_tap: ContextVar[Tap | None] = ContextVar("actors.tap", default=None)
"""The tap of systems that are opened without one."""
