"""What an operation is called with, besides its parameters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from volant.http import interruptible
from volant.journal import IdempotencyKey
from volant.model import EventId, Problem
from volant.vm import Version

from ._deps import ApiDeps

T = TypeVar("T")


@dataclass(kw_only=True)
class Context:
    """One call of an operation."""

    deps: ApiDeps
    scope: Any
    """Of ASGI: who calls, and from where."""
    key: IdempotencyKey | None = None
    """For the journal, of a request that may be sent again."""
    versions: Collection[Version] | None = None
    """States of the VM of which the caller wants one to be the present one; None when any will do."""
    since: EventId = field(init=False)
    """The newest event when the call began."""

    def __post_init__(self) -> None:
        self.since = self.deps.store.projection.last_event

    @property
    def caller(self) -> str:
        """Names who calls."""
        caller: str = self.scope["state"]["caller"]
        return caller

    @property
    def stopping(self) -> trio.Event:
        """Set when the daemon stops."""
        event: trio.Event = self.scope["state"]["stopping"]
        return event

    async def unless_stopping(self, wait: Callable[[], Awaitable[T]], otherwise: str = "the daemon stops") -> T:
        """Waits for something that may take long. :raises Problem: 503 the daemon stops meanwhile."""
        done: list[T] = []

        async def run() -> None:
            done.append(await wait())

        async with interruptible(self.stopping) as waits:
            await waits.until(run)
        if not done:
            raise Problem(503, "daemon-stopping", otherwise, hint="call again when it is back")
        return done[0]
