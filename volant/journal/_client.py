"""How the rest of the daemon asks the journal."""

from __future__ import annotations

from typing import TypeVar

from actors import ActorDown, AskTimeout, Ref, Request
from volant.model import Problem

from ._journal import Journal

R = TypeVar("R")


async def ask_journal(journal: Ref[Journal], message: Request[R], timeout_s: float = 60.0) -> R:
    """Returns the journal's answer.

    :raises Problem: the journal refuses; 503 `journal-down` it does not answer, and may have made the change or not.
    """
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
