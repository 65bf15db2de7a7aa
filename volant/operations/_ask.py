"""How routes ask the journal."""

from __future__ import annotations

from typing import TypeVar

from actors import ActorDown, AskTimeout, Request
from volant.model import Problem

from ._deps import ApiDeps

R = TypeVar("R")
_ASK_S = 60.0


async def ask_journal(deps: ApiDeps, message: Request[R]) -> R:
    """What it answers. :raises Problem: what it refuses with; 503 it can't be reached."""
    try:
        return await deps.journal.ask(message, timeout_s=_ASK_S)
    except (ActorDown, AskTimeout) as error:
        raise Problem(
            503, "journal-down", f"the journal could not keep the change: {error}",
            hint="look whether it was made, and try again",
        ) from error  # fmt: skip
