"""WebSockets to a VM: two directions over one socket, and their end when the VM moves to another host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import trio

from volant.http import Call
from volant.model import Desired, Key
from volant.operations import ApiDeps

MOVED = 4307


def moved(deps: ApiDeps, vm_id: int, vm: Key) -> Callable[[], tuple[int, str] | None]:
    """Returns a function that returns the close code and the reason once another host has the VM, before that None.

    Call it before the WebSocket opens. Later, another VM may have the name, here or on another host.
    """
    fleet, rows = deps.fleet, deps.store.projection
    if fleet is None or rows.by_id(vm_id) is None:
        return lambda: None
    names = fleet.names["vms"]
    before = names.claim(vm)

    def host_now() -> str | None:
        row = rows.by_id(vm_id)
        if row is not None and row.leaving is not None and row.desired is Desired.DELETED:
            # It is certain, and what is known of the claim may be old.
            return row.leaving.to_host
        now = names.claim(vm)
        if before is None or now is None or now.vm != before.vm or now.owner == fleet.host:
            return None
        return now.owner

    def ending() -> tuple[int, str] | None:
        host = host_now()
        return None if host is None else (MOVED, f"the VM is on the host {host} now")

    return ending


class Session(ABC):
    """One client. The session ends between two messages, never within one, unless the client has disconnected."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.over = trio.Event()
        """Set when the session is about to end."""
        self._ending: tuple[int, str] | None = None
        self._left = False

    async def run(self) -> None:
        """Runs until one of the sides ends, or one of the events of `ends` happens."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop)
            for end in self.ends():
                nursery.start_soon(self._end_on, *end)
            nursery.start_soon(self._receive, nursery.cancel_scope)
            await self.send_all()
            nursery.cancel_scope.cancel()
        if not self._left:
            await self.call.close(*(self._ending or self.reason()))

    def end(self, code: int, reason: str) -> None:
        """Ends the session; the first reason counts."""
        if self._ending is None:
            self._ending = code, reason
            self.over.set()

    def ends(self) -> Iterator[tuple[trio.Event, int, str]]:
        """Yields events that end the session, with code and reason, besides the end of every request."""
        yield from ()

    async def _stop(self) -> None:
        await self.call.stopping.wait()
        self.end(*self.call.stopping.closing)

    async def _end_on(self, event: trio.Event, code: int, reason: str) -> None:
        await event.wait()
        self.end(code, reason)

    async def _receive(self, scope: trio.CancelScope) -> None:
        while (message := await self.call.receive())["type"] != "websocket.disconnect":
            if message["type"] == "websocket.receive" and self._ending is None:
                await self.take(message)
        self._left = True
        scope.cancel()

    @abstractmethod
    async def send_all(self) -> None:
        """Sends to the client until `over` is set, or everything is sent."""

    @abstractmethod
    async def take(self, message: Mapping[str, Any]) -> None:
        """Handles a message of the client."""

    @abstractmethod
    def reason(self) -> tuple[int, str]:
        """Returns code and reason after `send_all` has ended."""
