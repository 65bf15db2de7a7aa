"""Tools that read logs and events."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import trio

from volant.journal import EventGap
from volant.logs import LogGap
from volant.model import Event, EventId, EventType, LogLine, Name, StreamGap
from volant.operations import find_vm, open_log

from ._text import BUDGET, clip, fitting, fitting_last, weight
from ._tool import Result, ToolCall, log_link, tool

if TYPE_CHECKING:
    from volant.fleet import Fleet

_PAGE_BYTES = 64 * 1024
_LINE_BYTES = 4 * 1024


class Logs(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The log lines to read."""

    vm: Name
    tail: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    """The number of lines from the end."""
    since: Annotated[int, msgspec.Meta(ge=0, le=10**18 - 1)] | None = None
    """Only lines after this `seq`: pass `next_since` of an earlier call to get new lines. Overrides `tail`."""
    stream: list[Literal["stdout", "stderr", "console"]] = []
    """The streams; default: all. `console` is the kernel and the boot, the others are the workload's."""


class LogPage(msgspec.Struct, frozen=True):
    """Lines of a log, oldest first."""

    lines: list[LogLine]
    next_since: int
    """The `since` that continues after the last line."""
    left_out: int
    """The number of requested lines that did not fit: older ones, or with `since` newer ones."""
    lost: int = 0
    """The number of lines after `since` that have expired."""


@tool(
    "vms_logs",
    "Read the log of a VM",
    "Read the output of the console (kernel and boot) and the workload of a VM, even if it is stopped or has "
    "crashed. Use it to find out why a VM does not boot or its workload fails. The output of vms_exec is not in it.",
    operation="vm_logs",
    read_only=True,
)
async def read_logs(call: ToolCall, wanted: Logs) -> Result[LogPage]:
    row = find_vm(call.deps, call.named(wanted.vm))
    log = open_log(call.deps, row)
    lines: list[LogLine] = []
    bytes_kept = left_out = lost = 0
    position = log.newest if wanted.since is None else min(wanted.since, log.newest)
    newest = wanted.since is None
    async with log.cursor(
        since_seq=wanted.since,
        tail=wanted.tail if newest else None,
        streams=frozenset(wanted.stream),
        follow=False,
    ) as cursor:
        while taken := await call.until(partial(cursor.take, 64 * 1024)):
            if isinstance(taken, LogGap):
                lost += taken.last - taken.first + 1
                continue
            for frame in taken:
                line = msgspec.json.decode(frame, type=LogLine)
                lines.append(msgspec.structs.replace(line, line=clip(line.line, _LINE_BYTES)))
                bytes_kept += weight(lines[-1]) + 1
            if newest:
                kept = fitting_last(lines)
                left_out += len(lines) - len(kept)
                lines = kept
            elif bytes_kept > BUDGET:
                kept = fitting(lines)
                left_out = max(0, log.newest - kept[-1].seq)
                lines = kept
                break
        if lines:
            position = lines[-1].seq
        elif not newest:
            position = max(position, cursor.position)
    return Result(LogPage(lines, position, left_out, lost), links=(log_link(row.name),))


class Events(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The events to read."""

    since: str | None = None
    """Only events after this one: `next` of an earlier call, or the `id` of an event; `0` for the oldest one. Without
    it, the newest ones."""
    vm: Name | None = None
    """Only events of this VM."""
    types: list[EventType] = []
    """The types of events; default: all."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 50
    """The number of events to look at."""
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=50)] = 0.0
    """How long to wait for an event if there is none."""


class EventPage(msgspec.Struct, frozen=True):
    """Events, oldest first."""

    events: list[Event]
    next: str
    """The `since` that continues after these events."""
    gap: StreamGap | None = None
    """Expired events after `since`."""


@tool(
    "vms_events",
    "List events of VMs",
    "List events of VMs, in order: created, starting, running, stopped, crashed (and why), deleted. Without `since` "
    "you get the newest. Pass `next` of one call as `since` of the next to miss nothing, and `wait_s` to wait for an "
    "event.",
    operation="vm_events",
    read_only=True,
)
async def see_events(call: ToolCall, wanted: Events) -> Result[EventPage]:
    fleet = call.deps.fleet
    if fleet is not None and fleet.spans(call.scope):
        return await _see_events_of_all(call, fleet, wanted)
    log = call.deps.store.events
    after: EventId | str | None = wanted.since and wanted.since[:200]
    gap = None
    if not after:
        after = EventId(log.epoch, max(log.oldest.seq - 1, log.newest.seq - wanted.limit))
    elif after == "0":
        after = "oldest"
    elif (missed := log.gap(after)) is not None:
        gap = msgspec.json.decode(missed.data, type=StreamGap)
        after = "oldest"
    found: list[Event] = []
    looked_at = 0
    deadline = trio.current_time() + wanted.wait_s
    is_seen = call.deps.store.projection.sees(call.listed)
    async with log.cursor(after) as cursor:
        position = cursor.position
        while looked_at < wanted.limit:
            at_end = position.seq >= log.newest.seq
            if at_end and (found or trio.current_time() >= deadline):
                break
            with trio.CancelScope(deadline=deadline if at_end else float("inf")) as scope:
                taken = await call.until(partial(cursor.take, _PAGE_BYTES))
            if scope.cancelled_caught or not taken:
                break
            if isinstance(taken, EventGap):
                gap = msgspec.json.decode(taken.data, type=StreamGap)
                position = cursor.position
                continue
            for frame in taken[: wanted.limit - looked_at]:
                looked_at += 1
                position = EventId(log.epoch, frame.seq)
                if is_seen(frame.event) and _wants(wanted, frame.event):
                    found.append(frame.event)
    page = fitting(found)
    return Result(EventPage(page, page[-1].id if len(page) < len(found) else str(position), gap))


async def _see_events_of_all(call: ToolCall, fleet: Fleet, wanted: Events) -> Result[EventPage]:
    """Reads the events of all hosts of the fleet."""
    from volant.fleet import Followed, follow, position_text

    is_seen = call.deps.store.projection.sees(call.listed)
    query: dict[str, str | list[str]] = {"types": ",".join(wanted.types)} if wanted.types else {}
    if wanted.vm is not None:
        query["vm"] = wanted.vm
    followed = Followed(
        log=call.deps.store.events,
        scope=call.scope,
        path="/api/v1/events/vms",
        query=query,
        matching=lambda frames: [frame for frame in frames if is_seen(frame.event) and _wants(wanted, frame.event)],
    )
    if wanted.since:
        after = "oldest" if wanted.since == "0" else wanted.since
    else:
        heads = {member.number: member.head for member in await fleet.known_members()}
        before = {number: EventId(head.epoch, max(0, head.seq - wanted.limit)) for number, head in heads.items()}
        after = position_text(before)
    found: list[tuple[str, Event]] = []
    gap = None
    deadline = trio.current_time() + wanted.wait_s
    async with follow(fleet, followed, after) as cursor:
        position = cursor.position
        while not wanted.since or len(found) < wanted.limit:
            if cursor.at_end and (found or trio.current_time() >= deadline):
                break
            with trio.CancelScope(deadline=deadline if cursor.at_end else float("inf")) as scope:
                taken = await call.until(cursor.take)
            if scope.cancelled_caught:
                break
            for place, block in taken:
                if not wanted.since or len(found) < wanted.limit:
                    position = place
                    if not block.is_gap:
                        found.append((place, msgspec.json.decode(block.data, type=Event)))
                    elif wanted.since:
                        gap = msgspec.json.decode(block.data, type=StreamGap)
            if not taken:
                position = cursor.position
    if not wanted.since:
        # The newest of all hosts; what is left out was before them.
        found = sorted(found, key=lambda each: each[1].timestamp)[-wanted.limit :]
    page = fitting([event for _, event in found])
    return Result(EventPage(page, found[len(page) - 1][0] if len(page) < len(found) else position, gap))


def _wants(wanted: Events, event: Event) -> bool:
    return event.image is None and wanted.vm in (None, event.name) and (not wanted.types or event.type in wanted.types)
