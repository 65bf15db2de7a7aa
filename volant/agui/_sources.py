"""The VMs of an overview and their events, from this host or from all hosts of its fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
import trio

from volant.http import Call
from volant.journal import EventCursor, EventGap
from volant.model import Event, Key, Problem, VmView
from volant.operations import ApiDeps, Context
from volant.operations.vms import list_vms

if TYPE_CHECKING:
    # Few hosts are in a fleet.
    from volant.fleet import Fleet, FleetCursor

MAX_LAG = 4096
"""Maximum events that a reader may be behind; above that it gets the state instead."""

_VM_S = 5.0
_AT_ONCE = 8

Happened = tuple[Event, VmView | None]
"""An event and its VM at present, which may be newer than the event; None if there is no such VM, or its host does not
answer."""


class Source(Protocol):
    """The source of an overview."""

    async def state(self) -> Sequence[VmView]:
        """Returns the present VMs, at the beginning and after each `behind` of `take`."""

    async def take(self) -> Sequence[Happened] | Literal["behind"]:
        """Waits for events. Returns `behind` if some are missing, or there are too many of them, so that the state is
        needed.

        :raises trio.EndOfChannel: the daemon stops
        """


@asynccontextmanager
async def watching(deps: ApiDeps, call: Call) -> AsyncIterator[Source]:
    """Watches the VMs that a caller requests. :raises Problem: 503, the hosts of the fleet are not known yet."""
    fleet = deps.fleet
    if fleet is None or not fleet.spans(call.scope):
        async with deps.store.events.cursor(None) as cursor:
            yield _OfThisHost(deps, cursor, call.listed)
        return
    from volant.fleet import Followed, follow

    is_seen = deps.store.projection.sees(call.listed)
    first = await list_vms(Context(deps=deps, scope=call.scope))
    followed = Followed(
        log=deps.store.events,
        scope=call.scope,
        path="/api/v1/events/vms",
        query={},
        matching=lambda frames: [frame for frame in frames if frame.event.image is None and is_seen(frame.event)],
    )
    async with follow(fleet, followed, first.event_id) as place:
        yield _OfFleet(deps, fleet, call.scope, place, first.items)


class _OfThisHost:
    def __init__(self, deps: ApiDeps, cursor: EventCursor, listed: str | None) -> None:
        self._events = deps.store.events
        self._projection = deps.store.projection
        self._cursor = cursor
        self._listed = listed
        self._is_seen = deps.store.projection.sees(listed)
        self._true_to = 0
        """The number of the last event in the state. Events up to it are not returned again."""

    async def state(self) -> Sequence[VmView]:
        self._true_to = self._projection.last_event.seq
        return [row.view for row in self._projection.rows() if self._listed in (None, row.project)]

    async def take(self) -> Sequence[Happened] | Literal["behind"]:
        taken = await self._cursor.take()
        if not taken:
            raise trio.EndOfChannel
        if isinstance(taken, EventGap) or is_behind(self._cursor, self._true_to, self._events.newest.seq):
            return "behind"
        events = [frame.event for frame in taken if frame.seq > self._true_to and frame.event.image is None]
        return [(event, self._now(event)) for event in events if self._is_seen(event)]

    def _now(self, event: Event) -> VmView | None:
        row = self._projection.by_id(event.vm_id)
        return None if row is None else row.view


class _OfFleet:
    def __init__(
        self, deps: ApiDeps, fleet: Fleet, scope: Any, place: FleetCursor, first: Sequence[VmView] | None
    ) -> None:
        self._deps = deps
        self._fleet = fleet
        self._scope = scope
        self._place = place
        self._first = first

    async def state(self) -> Sequence[VmView]:
        vms, self._first = self._first, None
        return (await list_vms(Context(deps=self._deps, scope=self._scope))).items if vms is None else vms

    async def take(self) -> Sequence[Happened] | Literal["behind"]:
        taken = await self._place.take()
        if any(block.is_gap for _, block in taken):
            return "behind"
        try:
            events = [msgspec.json.decode(block.data, type=Event) for _, block in taken]
        except msgspec.MsgspecError:
            # An event of a host with a newer version, which has other events.
            return "behind"
        now = await self._now({Key(event.project, event.name) for event in events})
        return [(event, now[Key(event.project, event.name)]) for event in events]

    async def _now(self, keys: set[Key]) -> dict[Key, VmView | None]:
        """Requests VMs by their names, as a VM that has left a host may have moved to another one."""
        found: dict[Key, VmView | None] = {}
        places = trio.CapacityLimiter(_AT_ONCE)

        async def ask(key: Key) -> None:
            async with places:
                found[key] = None
                with trio.move_on_after(_VM_S):
                    found[key] = await self._ask(key)

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(ask, key)
        return found

    async def _ask(self, key: Key) -> VmView | None:
        from volant.fleet import request_headers

        named = self._scope["state"] | {"project": key.project, "names_project": True}
        try:
            host = await self._fleet.names["vms"].find(key)
            if host is None:
                return None
            if host == self._fleet.host:
                row = self._deps.store.projection.get(key)
                return None if row is None else row.view
            headers = request_headers({"state": named})
            answer = await self._fleet.peers.ask(host, f"/api/v1/vms/{key.name}", headers, timeout_s=_VM_S)
            return msgspec.json.decode(answer.body, type=VmView) if answer.status == 200 else None
        except (Problem, msgspec.MsgspecError):
            return None


def is_behind(cursor: EventCursor, true_to: int, newest: int) -> bool:
    """Returns whether a reader should get the state instead of events. One state replaces all events that it
    contains."""
    return cursor.seq > true_to and newest - cursor.seq > MAX_LAG
