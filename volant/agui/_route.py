"""`/ws/v1/agui` and `/api/v1/agui`: events of VMs as AG-UI events.

A WebSocket that broke in the middle of a boot's run is resumed with `?resume=true`. Only the client knows its open
step, as the last event may not have arrived: it sends `step`. Without `step`, the daemon uses the last step that it
sent to that client, which it remembers for the last 1,000 clients. No step is open while a VM just runs, so a restarted
daemon, which remembers none, is nearly always right. Rejected: run ids that contain the open step, as an id is chosen
when a run begins, mostly by the client.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, get_args

import msgspec
import trio

from volant.http import (
    NORMAL,
    Call,
    Limits,
    Query,
    StreamRoute,
    interruptible,
    new_request_id,
    read_call_body,
)
from volant.journal import EventCursor, EventGap
from volant.model import EventType, Name, Permission, VmRow, check_plain, invalid
from volant.operations import TABLE, TEN_MINUTES, Answer, ApiDeps, Parameter, find_vm

from ._events import AguiEvent, Boots, Overview, RunAgentInput
from ._sources import Source, is_behind, watching

DEFAULT_DURATION_S = 60.0
MAX_DURATION_S = 600.0

_WEBSOCKET = re.compile(r"/ws/v1/agui/?\Z")
_HTTP = re.compile(r"/api/v1/agui/?\Z")
_MAX_ID = 200
_MAX_LEFT_OPEN = 1000
_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]

_encoder = msgspec.json.Encoder()

Send = Callable[[Sequence[AguiEvent]], Awaitable[None]]


_DURATION = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": TEN_MINUTES})]

TABLE.declare(
    "POST /api/v1/agui",
    "agui",
    Permission.VIEW,
    "Follow the events of VMs as an AG-UI run",
    answers={
        200: Answer("Server-sent events with one AG-UI event each", str, "text/event-stream", items=get_args(AguiEvent))
    },
    body=RunAgentInput,
    examples={"A run": {"threadId": "vms", "runId": "1"}},
    documented=(
        Parameter("vm", Name, "Only events of this VM. The run is its boot, and ends with it"),
        Parameter("duration", _DURATION, "How long the run lasts: default `60s` without `vm`, at most `10m`"),
    ),
    errors=(404,),
    vm_in_query=True,
)
TABLE.declare(
    "GET /ws/v1/agui",
    "agui_websocket",
    Permission.VIEW,
    "Follow the events of VMs as AG-UI runs (WebSocket)",
    answers={101: Answer("One AG-UI event per text message", items=get_args(AguiEvent))},
    documented=(
        Parameter("vm", Name, "Only events of this VM. Each of its boots is a run"),
        Parameter("thread_id", str, "The thread of the runs; at most 200 characters"),
        Parameter("run_id", str, "The id of the first run; at most 200 characters"),
        Parameter("resume", bool, "Continue the run, which began on an earlier connection"),
        Parameter("step", str, "With `resume` and `vm`: the client's open step, empty for none"),
    ),
    errors=(404, 426),
    credentials_in_query=True,
    vm_in_query=True,
    details="Close codes: 1000 when the VM of `vm` is deleted, 1001 when the daemon stops.",
)


def routes(deps: ApiDeps, limits: Limits) -> list[StreamRoute]:
    """Returns the routes of this resource."""
    left_open = _LeftOpen()

    async def websocket(call: Call) -> None:
        query = call.query(credentials=True)
        parameters = _Parameters.of(query)
        query.done()
        row = _row(deps, call, parameters.vm)

        async def send(events: Sequence[AguiEvent]) -> None:
            if events:
                await call.send_texts([_encoder.encode(event) for event in events])

        async def boots_of(row: VmRow, cursor: EventCursor) -> bool:
            boots = Boots(parameters.thread_id, parameters.run_id, _new_run_id)
            if parameters.resume:
                boot, step = left_open.take(row.id, parameters.thread_id, parameters.run_id)
                boots.resume(boot, step if parameters.step is None else parameters.step or None)
            try:
                return await _stream_boots(call, deps, cursor, boots, row, send)
            finally:
                left_open.keep(row.id, parameters.thread_id, boots)

        async def answer(stream: Callable[[], Awaitable[bool]]) -> None:
            async def whole() -> None:
                ended = await stream()
                await call.close(*((NORMAL, "") if ended else call.stopping.closing))

            await call.accept()
            await call.while_connected(whole)

        # Both are opened before the answer begins, so the client misses nothing after that.
        if row is None:
            async with watching(deps, call) as source:
                overview = parameters.overview()
                await answer(partial(_stream_overview, call, source, overview, send, resumed=parameters.resume))
        else:
            async with deps.store.events.cursor(None) as cursor:
                await answer(partial(boots_of, row, cursor))

    async def http(call: Call) -> None:
        query = call.query(credentials=False)
        vm = query.text("vm")
        given = query.text("duration")
        duration_s = query.duration("duration", DEFAULT_DURATION_S, maximum_s=MAX_DURATION_S)
        query.done()
        body = await read_call_body(call, RunAgentInput, limits)
        parameters = _Parameters(vm, _identifier(body.thread_id, "threadId"), _identifier(body.run_id, "runId"))
        # A run may last for days, and a client may send any amount of history with it.
        del body
        call.body.release()
        row = _row(deps, call, parameters.vm)
        deadline = float("inf") if row is not None and given is None else trio.current_time() + duration_s

        async def send(events: Sequence[AguiEvent]) -> None:
            if events:
                await call.write(b"".join(b"data: %b\n\n" % _encoder.encode(event) for event in events))

        async def boot_of(row: VmRow, cursor: EventCursor) -> None:
            boots = Boots(parameters.thread_id, parameters.run_id, _new_run_id, once=True)
            await _stream_boots(call, deps, cursor, boots, row, send, deadline=deadline)
            await send(boots.end())

        async def answer(stream: Callable[[], Awaitable[object]]) -> None:
            await call.start(200, _SSE)
            if await call.while_connected(stream):
                await call.finish()

        if row is None:
            async with watching(deps, call) as source:
                await answer(partial(_stream_overview, call, source, parameters.overview(), send, deadline=deadline))
        else:
            async with deps.store.events.cursor(None) as cursor:
                await answer(partial(boot_of, row, cursor))

    return [
        StreamRoute(_WEBSOCKET, websocket, http=False, websocket=True),
        StreamRoute(_HTTP, http, methods=frozenset({"POST"})),
    ]


class _Parameters(msgspec.Struct, frozen=True):
    """The parameters of a request."""

    vm: str | None
    thread_id: str
    run_id: str
    resume: bool = False
    step: str | None = None
    """The client's open step, empty for none; None if it was not given."""

    @classmethod
    def of(cls, query: Query) -> _Parameters:
        """Parses the parameters. :raises Problem: 400."""
        thread_id, run_id = query.text("thread_id"), query.text("run_id")
        parameters = cls(
            query.text("vm"),
            f"thread-{new_request_id()}" if thread_id is None else _identifier(thread_id, "thread_id"),
            _new_run_id() if run_id is None else _identifier(run_id, "run_id"),
            query.flag("resume", False),
            query.text("step"),
        )
        if parameters.step is not None:
            if not parameters.resume or parameters.vm is None:
                raise invalid("step", "step needs vm and resume=true")
            if parameters.step:
                _identifier(parameters.step, "step")
        if parameters.resume:
            for name, value in (("thread_id", thread_id), ("run_id", run_id)):
                if value is None:
                    raise invalid(name, f"resume needs {name}", hint="give those of the RUN_STARTED to resume")
        return parameters

    def overview(self) -> Overview:
        return Overview(self.thread_id, self.run_id)


class _LeftOpen(msgspec.Struct):
    """The boot and the step that disconnected clients had open in a run."""

    _known: OrderedDict[tuple[int, str, str], tuple[int, str | None]] = msgspec.field(default_factory=OrderedDict)

    def keep(self, vm_id: int, thread_id: str, boots: Boots) -> None:
        if boots.run_id:
            self._known[vm_id, thread_id, boots.run_id] = (boots.boot, boots.step)
            while len(self._known) > _MAX_LEFT_OPEN:
                self._known.popitem(last=False)

    def take(self, vm_id: int, thread_id: str, run_id: str) -> tuple[int, str | None]:
        return self._known.pop((vm_id, thread_id, run_id), (0, None))


async def _stream_overview(
    call: Call,
    source: Source,
    overview: Overview,
    send: Send,
    *,
    resumed: bool = False,
    deadline: float = float("inf"),
) -> bool:
    """Sends events of all VMs until `deadline` (True) or the daemon's stop (False)."""
    first = overview.begin(await source.state(), resumed=resumed)
    async with interruptible(call.stopping) as waits:
        await send(first)
        with suppress(trio.EndOfChannel):
            while (taken := await waits.until(source.take, deadline)) is not None:
                if taken == "behind":
                    await send(overview.catch_up(await source.state()))
                else:
                    await send([each for event, vm in taken for each in overview.events_for(event, vm)])
        await send(overview.end())
    return not call.stopping.is_set()


async def _stream_boots(
    call: Call,
    deps: ApiDeps,
    cursor: EventCursor,
    boots: Boots,
    row: VmRow,
    send: Send,
    *,
    deadline: float = float("inf"),
) -> bool:
    """Sends events of one VM until it is deleted (True), or its run ends, `deadline`, or the daemon stops (False)."""
    projection = deps.store.projection
    # Two tasks send: the lock keeps each message whole, and keeps the order in which they were made.
    turn = trio.Lock()
    true_to = projection.last_event.seq
    ended = False

    async def send_phases(revision: int) -> None:
        while (now := await projection.changed(row.id, revision)) is not None:
            revision = now.revision
            async with turn:
                await send(boots.phase(now))

    async with interruptible(call.stopping) as waits, trio.open_nursery() as nursery:
        async with turn:
            await send(boots.catch_up(projection.by_id(row.id)))
        nursery.start_soon(send_phases, row.revision)
        while not (ended or boots.over) and (taken := await waits.until(cursor.take, deadline)) is not None:
            if not taken:
                break
            async with turn:
                now = projection.by_id(row.id)
                events: list[AguiEvent] = []
                if isinstance(taken, EventGap) or is_behind(cursor, true_to, deps.store.events.newest.seq):
                    true_to = projection.last_event.seq
                    events += boots.catch_up(now)
                    ended = now is None
                else:
                    for frame in taken:
                        if frame.event.vm_id == row.id and frame.seq > true_to:
                            events += boots.events_for(frame.event, now)
                            ended = ended or frame.event.type is EventType.VM_DELETED
                await send(events)
        async with turn:
            nursery.cancel_scope.cancel()
    return ended


def _row(deps: ApiDeps, call: Call, vm: str | None) -> VmRow | None:
    """Returns the row of the requested VM. :raises Problem: 404."""
    return None if vm is None else find_vm(deps, call.named(vm))


def _identifier(text: str, name: str) -> str:
    """Returns an identifier. :raises Problem: 400."""
    if not text:
        raise invalid(name, f"{name} is empty")
    return check_plain(text, name, maximum=_MAX_ID)


def _new_run_id() -> str:
    return f"run-{new_request_id()}"
