"""`/api/v1/events/vms`: events of VMs, as server-sent events."""

from __future__ import annotations

import re

import trio

from volant.http import Call, Piece, StreamRoute, interruptible
from volant.journal import EventCursor, EventFrame, EventGap
from volant.model import EventType, Problem, is_name
from volant.operations import ApiDeps

KEEP_UP_S = 15.0
"""The interval of heartbeats, which carry the newest id."""

_PATH = re.compile(r"/api/v1/events/vms/?\Z")
_TYPES = frozenset(str(kind) for kind in EventType)
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]
_MAX_ID = 200


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """The routes of this resource."""
    blocks = _Blocks()

    async def events(call: Call) -> None:
        query = call.query(credentials=True)
        since, last_event_id = query.text("since"), query.text("last_event_id")
        wanted = _Filter(
            blocks,
            vm=query.text("vm"),
            types=query.words("types", _TYPES),
            labels=query.labels(),
            strict=query.text("on_gap"),
        )
        query.done()
        after = _after(call.header(b"last-event-id"), last_event_id, since)
        if wanted.strict and after is not None and after != "oldest":
            gap = deps.store.events.gap(after)
            if gap is not None:
                raise Problem(
                    410, "events-gone", f"the events after {after[:80]!r} are not kept, or never were",
                    hint=f"the oldest kept is {gap.oldest}; list the VMs, and continue from the list's Volant-Event-Id",
                )  # fmt: skip
        # The cursor is opened before the head is sent, so the client misses nothing after it.
        async with deps.store.events.cursor(after) as cursor:
            await call.start(200, _HEADERS)
            if call.method != "HEAD":
                await call.write(b"retry: 1000\n\n")
                if not await call.while_connected(lambda: _stream(call, cursor, wanted)):
                    return
            await call.finish()

    return [StreamRoute(_PATH, events, sse=True)]


class _Blocks:
    """The events that were sent last, as one piece: as a rule all readers get the same ones at the same time."""

    def __init__(self) -> None:
        self._frames: list[EventFrame] = []
        self._piece = Piece(b"\n")

    def of(self, frames: list[EventFrame]) -> Piece:
        """Returns the SSE blocks of all `frames`, of which there is at least one."""
        if frames is not self._frames:
            self._frames = frames
            self._piece = Piece(b"".join(frame.sse for frame in frames))
        return self._piece


class _Filter:
    """Which events a client wants. :raises Problem: 400."""

    def __init__(
        self, blocks: _Blocks, *, vm: str | None, types: frozenset[str], labels: dict[str, str], strict: str | None
    ) -> None:
        if vm is not None and not is_name(vm):
            raise Problem(400, "invalid-request", f"the parameter vm is {vm[:80]!r}, not a name", field="vm")
        if strict not in (None, "410"):
            raise Problem(
                400,
                "invalid-request",
                f"the parameter on_gap is {strict[:40]!r}",
                field="on_gap",
                hint="410 or nothing",
            )
        self._blocks = blocks
        self._vm = vm
        self._types = types
        self._labels = labels.items()
        self._all = vm is None and not types and not labels
        self.strict = strict is not None

    def of(self, frames: list[EventFrame]) -> Piece | None:
        """Returns the SSE blocks of the events that match, if there is one."""
        if self._all:
            return self._blocks.of(frames)
        matching = [frame.sse for frame in frames if self._wants(frame)]
        return Piece(b"".join(matching)) if matching else None

    def _wants(self, frame: EventFrame) -> bool:
        event = frame.event
        return (
            (self._vm is None or event.name == self._vm)
            and (not self._types or event.type in self._types)
            and self._labels <= event.labels.items()
        )


def _after(header: str | None, last_event_id: str | None, since: str | None) -> str | None:
    """Returns where to begin. The header wins, as an `EventSource` reconnects with its first URL."""
    for given in (header, last_event_id):
        if given:
            return given[:_MAX_ID]
    if since is None:
        return None
    if since == "0":
        return "oldest"
    return since[:_MAX_ID]


async def _stream(call: Call, cursor: EventCursor, wanted: _Filter) -> None:
    """Sends events until the daemon stops."""
    sent_to = cursor.position
    beat = trio.current_time() + KEEP_UP_S
    async with interruptible(call.stopping) as waits:
        while not waits.stopped():
            taken = await waits.until(cursor.take, beat)
            if taken is None:
                if waits.stopped():
                    break
                beat = trio.current_time() + KEEP_UP_S
                piece: Piece | None = _id_block(cursor)
            elif isinstance(taken, EventGap):
                piece = Piece(taken.sse)
            elif taken:
                piece = wanted.of(taken)
            else:
                break
            if piece is not None:
                sent_to = cursor.position
                await call.write_piece(piece)
        # A client that reconnects after our restart need not read filtered events again.
        if cursor.position != sent_to:
            await call.write_piece(_id_block(cursor))


def _id_block(cursor: EventCursor) -> Piece:
    return Piece(f"id: {cursor.position}\n\n".encode())
