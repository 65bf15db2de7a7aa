"""The context of a call of an operation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from volant.http import Ending, interruptible, listed_project, one_project, seen_project
from volant.journal import IdempotencyKey
from volant.model import Caller, EventId, Key
from volant.vm import Version

from ._deps import ApiDeps

T = TypeVar("T")


@dataclass(kw_only=True)
class Context:
    """One call of an operation."""

    deps: ApiDeps
    scope: Any
    """The ASGI scope, with the caller and its address."""
    key: IdempotencyKey | None = None
    """The idempotency key of a request that may be repeated, for the journal."""
    versions: Collection[Version] | None = None
    """The versions of the VM that the caller accepts; None for any."""
    missing_hosts: set[str] = field(default_factory=set)
    """Hosts of the fleet that did not answer, so the result lacks their part."""
    since: EventId = field(init=False)
    """The newest event when the call began."""

    def __post_init__(self) -> None:
        self.since = self.deps.store.projection.last_event

    @property
    def caller(self) -> Caller:
        """The caller."""
        caller: Caller = self.scope["state"]["caller"]
        return caller

    @property
    def project(self) -> str:
        """The project in which names are looked up. :raises Problem: 400, the caller asks for all projects."""
        return one_project(self.scope)

    @property
    def listed(self) -> str | None:
        """The project whose objects are listed; None for all projects."""
        return listed_project(self.scope)

    @property
    def seen(self) -> str | None:
        """The project whose part of shared objects is shown; None for all parts."""
        return seen_project(self.scope)

    def named(self, name: str) -> Key:
        """Returns the key of a name in the project. :raises Problem: see `project`."""
        return Key(self.project, name)

    @property
    def stopping(self) -> Ending:
        """Set when the daemon stops, or the caller's credentials end."""
        ending: Ending = self.scope["state"]["stopping"]
        return ending

    async def unless_stopping(self, wait: Callable[[], Awaitable[T]], otherwise: str = "the daemon stops") -> T:
        """Waits for something that may take long.

        :raises Problem: 503, the daemon stops meanwhile; 401, the caller's credentials end
        """
        done: list[T] = []

        async def run() -> None:
            done.append(await wait())

        async with interruptible(self.stopping) as waits:
            await waits.until(run)
        if not done:
            raise self.stopping.problem(otherwise, hint="call again when it is back")
        return done[0]
