"""How the rest of the daemon asks the journal."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from actors import ActorDown, AskTimeout, Request
from volant.model import Problem, current_cause

R = TypeVar("R")


class JournalRef(Protocol):
    """What takes messages to the journal: the reference to its actor, or, in a fleet, what has the other hosts agree
    before."""

    async def ask(self, message: Request[R], /, *, timeout_s: float) -> R:
        """Returns the journal's answer."""


async def ask_journal(journal: JournalRef, message: Request[R], timeout_s: float = 60.0) -> R:
    """Returns the journal's answer. The message carries the cause of the request that this task serves.

    :raises Problem: the journal refuses; 503 `journal-down` it does not answer, and may have made the change or not.
    """
    cause = current_cause.get()
    if cause is not None and getattr(message, "cause", cause) is None:
        message = msgspec.structs.replace(message, cause=cause)  # type: ignore[type-var]
    try:
        return await journal.ask(message, timeout_s=timeout_s)
    except (ActorDown, AskTimeout) as error:
        raise journal_down(error) from error


def journal_down(error: Exception) -> Problem:
    """Returns the problem for a change that the journal did not confirm."""
    return Problem(
        503, "journal-down", f"the journal did not confirm the change: {error}",
        hint="check whether the change was made, then retry; the daemon's log says why the journal fails",
    )  # fmt: skip
