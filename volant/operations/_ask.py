"""How routes ask the journal."""

from __future__ import annotations

from typing import TypeVar

from actors import Request
from volant import journal

from ._deps import ApiDeps

R = TypeVar("R")


async def ask_journal(deps: ApiDeps, message: Request[R]) -> R:
    """What it answers. :raises Problem: what it refuses with; 503 it can't be reached."""
    return await journal.ask_journal(deps.journal, message)
