"""AG-UI: every telling is a valid run, and its state is what the daemon knows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.api.agui_client import Telling
from tests.api.kit import UPGRADE, Api, websocket
from volant.agui import _sources
from volant.agui._events import AguiEvent, Boots, State
from volant.fleet._events import Block
from volant.journal import EventCursor, EventFrame, EventGap, FrameCursor
from volant.model import BASE, CreateVm, EventId, EventType, Phase, Reason, Status, VmRow, event_for, new_row

NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Socket(Telling):
    """A telling over a WebSocket."""

    def __init__(self, connection: WebSocketConnection) -> None:
        super().__init__()
        self.connection = connection

    async def next(self) -> dict[str, Any]:
        with trio.fail_after(10):
            return self.take(json.loads(await self.connection.get_message()))

    async def until(self, kind: str) -> dict[str, Any]:
        while (event := await self.next())["type"] != kind:
            pass
        return event

    async def _to_the_end(self) -> None:
        while True:
            await self.next()

    async def closing_code(self) -> int:
        with trio.fail_after(10):
            with pytest.raises(ConnectionClosed) as closed:
                await self._to_the_end()
        assert closed.value.reason is not None
        return int(closed.value.reason.code)


@asynccontextmanager
async def agui(served: Api, query: str = "") -> AsyncIterator[Socket]:
    async with websocket(f"ws://127.0.0.1:{served.server.port}/ws/v1/agui{query}") as connection:
        yield Socket(connection)


async def test_an_overview_has_the_state_and_each_event(served: Api) -> None:
    await served.crashed("old")
    async with agui(served, "?thread_id=t&run_id=r") as socket:
        started = await socket.next()
        assert started == {"type": "RUN_STARTED", "threadId": "t", "runId": "r", "protocolVersion": "1.0"}
        assert (await socket.next())["snapshot"]["vms"].keys() == {"old"}
        await served.crashed("new")
        names = []
        while "volant.vm.VM_CRASHED" not in names:
            names.append((await socket.until("CUSTOM"))["name"])
        assert names == ["volant.vm.VM_CREATED", "volant.vm.VM_STARTING", "volant.vm.VM_CRASHED"]
        assert socket.vms["new"] == (await served.client.get("/api/v1/vms/new")).json()
        assert (await served.client.delete("/api/v1/vms/old")).status_code == 204
        while names[-1] != "volant.vm.VM_DELETED":
            names.append((await socket.until("CUSTOM"))["name"])
        assert socket.vms.keys() == {"new"}


async def test_an_overview_that_resumes_begins_with_the_state(served: Api) -> None:
    async with agui(served) as socket:
        run = await socket.next()
        await socket.next()
    query = f"?thread_id={run['threadId']}&run_id={run['runId']}&resume=true"
    async with agui(served, query) as again:
        again.running = True
        assert (await again.next())["type"] == "STATE_SNAPSHOT"


@pytest.mark.parametrize("step", ["launch", ""])
async def test_a_resumed_boot_finishes_the_step_that_the_client_has_open(served: Api, step: str) -> None:
    await served.crashed("demo")
    async with agui(served, f"?vm=demo&thread_id=t&run_id=r&resume=true&step={step}") as again:
        again.running = True
        again.steps = [step] if step else []
        await again.until("RUN_ERROR")
        assert again.types.count("STEP_FINISHED") == (1 if step else 0)


async def test_the_stop_of_the_daemon_finishes_the_overview_and_closes_with_1001(served: Api) -> None:
    async with agui(served) as socket:
        await socket.next()
        served.server.stopping.set()
        assert await socket.closing_code() == 1001
        assert socket.types[-1] == "RUN_FINISHED"


def test_a_vm_that_moves_to_another_host_stays_in_the_state() -> None:
    here, there = (
        new_row(CreateVm(name="demo", cpu_cores=1, memory_mb=128), BASE, vm_id=number, now=NOW)
        for number in (5, 2_000_000_001)
    )
    state = State()
    state.snapshot([here.view])
    deleting = msgspec.structs.replace(here, status=Status.DELETING)
    gone = event_for(deleting, None, event_id=EventId("e", 1), message="moved", now=NOW)
    assert gone is not None
    (delta,) = state.after(gone, there.view)
    (change,) = delta.delta
    assert (change.op, change.path, change.value) == ("add", "/vms/demo", msgspec.to_builtins(there.view))
    # A late event of the VM on its first host changes nothing.
    assert state.after(msgspec.structs.replace(gone, type=EventType.VM_PAUSED), there.view) == []
    (removed,) = state.after(msgspec.structs.replace(gone, vm_id=there.id), None)
    assert removed.delta[0].op == "remove"


async def test_an_event_of_a_newer_host_that_is_not_known_here_leads_to_a_new_snapshot() -> None:
    class Place:
        async def take(self) -> list[tuple[str, Block]]:
            return [("", Block(EventId("e", 1), b'event: VM_FLOWN\ndata: {"type": "VM_FLOWN"}\n\n'))]

    unused: Any = None
    place: Any = Place()
    assert await _sources._OfFleet(unused, unused, unused, place, None).take() == "behind"


async def test_a_reader_that_is_far_behind_gets_a_new_snapshot(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "MAX_LAG", -1)
    async with agui(served) as socket:
        await socket.next()
        await socket.next()
        vm = await served.crashed("demo")
        while socket.vms.get("demo", {}).get("status") != "crashed":
            assert (await socket.next())["type"] == "STATE_SNAPSHOT"
        assert socket.vms["demo"] == vm


async def test_one_state_does_for_all_events_that_it_contains(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "MAX_LAG", 1)
    read, reads = FrameCursor.take, trio.Event()

    async def take_one(cursor: EventCursor) -> list[EventFrame] | EventGap:
        await reads.wait()
        return await read(cursor, 1)

    monkeypatch.setattr(FrameCursor, "take", take_one)
    async with agui(served) as socket:
        await socket.until("STATE_SNAPSHOT")
        for name in ("demo", "other"):
            await served.create(name)
            while (await served.client.get(f"/api/v1/vms/{name}")).json()["status"] != "crashed":
                pass
        reads.set()
        await socket.until("STATE_SNAPSHOT")
        assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
        await socket.until("CUSTOM")
    assert socket.types.count("STATE_SNAPSHOT") == 2


async def test_each_boot_of_a_vm_is_a_run(served: Api) -> None:
    await served.crashed("demo")
    async with agui(served, "?vm=demo&run_id=first") as socket:
        for run_id in ("first", None):
            assert (await served.client.post("/api/v1/vms/demo/start?wait=crashed")).status_code == 200
            started = await socket.next()
            assert started["type"] == "RUN_STARTED"
            assert run_id in (None, started["runId"])
            error = await socket.until("RUN_ERROR")
            assert error["code"] == (await served.client.get("/api/v1/vms/demo")).json()["reason"]["code"]
            assert error["message"]
        assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
        assert await socket.closing_code() == 1000
        assert socket.types.count("TEXT_MESSAGE_START") == socket.types.count("TEXT_MESSAGE_END") == 4


async def test_another_vm_of_the_same_name_is_another_vm(served: Api) -> None:
    await served.crashed("demo")
    async with agui(served, "?vm=demo") as socket:
        assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
        await served.crashed("demo")
        assert await socket.closing_code() == 1000
        assert socket.types == []


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("?vm=none", 404, None),
        ("?vm=No%20name", 404, None),
        ("?resume=true&thread_id=t", 400, "run_id"),
        ("?resume=true&run_id=t", 400, "thread_id"),
        ("?step=launch&vm=demo", 400, "step"),
        ("?step=launch&resume=true&thread_id=t&run_id=r", 400, "step"),
        ("?run_id=", 400, "run_id"),
        ("?run_id=%0a", 400, "run_id"),
        (f"?thread_id={'t' * 201}", 400, "thread_id"),
        ("?other=1", 400, "other"),
    ],
)
async def test_wrong_parameters_are_refused_before_the_upgrade(
    served: Api, query: str, status: int, field: str | None
) -> None:
    headers = {name.replace("_", "-"): value for name, value in UPGRADE.items()}
    answer = await served.client.get(f"/ws/v1/agui{query}", headers=headers)
    assert answer.status_code == status
    assert answer.json().get("field") == field


# Over HTTP


def told(answer_text: str) -> Telling:
    telling = Telling()
    for block in answer_text.removesuffix("\n\n").split("\n\n"):
        telling.take(json.loads(block.removeprefix("data: ")))
    return telling


BODY = {"threadId": "t", "runId": "r", "messages": [], "tools": [], "context": [], "state": {}, "forwardedProps": {}}


async def test_over_http_a_run_ends_after_its_duration(served: Api) -> None:
    await served.crashed("demo")
    answer = await served.client.post("/api/v1/agui?duration=50ms", json={**BODY, "ofTomorrow": 1})
    assert answer.headers["content-type"].startswith("text/event-stream")
    telling = told(answer.text)
    assert telling.types == ["RUN_STARTED", "STATE_SNAPSHOT", "RUN_FINISHED"]
    assert telling.vms.keys() == {"demo"}


async def test_over_http_a_vms_run_is_one_boot(served: Api) -> None:
    await served.crashed("demo")
    answers = []

    async def listen() -> None:
        answers.append(await served.client.post("/api/v1/agui?vm=demo", json=BODY))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        while served.deps.store.events.statistics().readers == 0:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.01)
        await served.client.post("/api/v1/vms/demo/start?wait=crashed")
    telling = told(answers[0].text)
    assert telling.types[:2] == ["RUN_STARTED", "STATE_SNAPSHOT"]
    assert telling.types[-1] == "RUN_ERROR"


async def test_over_http_there_is_always_a_run(served: Api) -> None:
    await served.crashed("demo")
    answer = await served.client.post("/api/v1/agui?vm=demo&duration=10ms", json=BODY)
    assert told(answer.text).types == ["RUN_STARTED", "RUN_FINISHED"]


@pytest.mark.parametrize(
    ("query", "body", "status", "field"),
    [
        ("", {"runId": "r", "messages": []}, 400, "threadId"),
        ("", {**BODY, "runId": 7}, 400, "runId"),
        ("", {**BODY, "runId": ""}, 400, "runId"),
        ("?duration=11m", BODY, 400, "duration"),
        ("?vm=none", BODY, 404, None),
    ],
)
async def test_wrong_parameters_of_a_run_are_refused(
    served: Api, query: str, body: dict[str, Any], status: int, field: str | None
) -> None:
    answer = await served.client.post(f"/api/v1/agui{query}", json=body)
    assert answer.status_code == status
    assert answer.json().get("field") == field


async def test_bodies_are_bounded_and_json(served: Api) -> None:
    large = await served.client.post("/api/v1/agui", json={**BODY, "messages": ["x" * 2**20]})
    assert large.status_code == 413
    text = await served.client.post("/api/v1/agui", content=b"x", headers={"content-type": "text/plain"})
    assert text.status_code == 415


# Boots, without a server


def row(status: Status, phase: Phase = Phase.NONE, *, booted: int = 1, reason: Reason | None = None) -> VmRow:
    request = CreateVm(name="demo", cpu_cores=1, memory_mb=128)
    new = new_row(request, BASE, vm_id=7, now=NOW)
    return msgspec.structs.replace(new, status=status, phase=phase, booted=booted, reason=reason)


def take(telling: Telling, events: list[AguiEvent]) -> list[str]:
    before = len(telling.types)
    for event in events:
        telling.take(json.loads(msgspec.json.encode(event)))
    return telling.types[before:]


def happened(boots: Boots, before: VmRow, after: VmRow) -> list[AguiEvent]:
    event = event_for(before, after, event_id=EventId("e", 1), message="it happened", now=NOW)
    assert event is not None
    return boots.events_for(event, after)


def test_phases_are_steps_that_are_closed_before_the_run_ends() -> None:
    telling, boots = Telling(), Boots("t", "r", lambda: "next")
    pending, image = row(Status.PENDING, booted=0), row(Status.STARTING, Phase.IMAGE)
    assert take(telling, boots.catch_up(pending)) == []
    # The row is seen before the event that led to it: the step waits for it.
    assert take(telling, boots.phase(image)) == []
    assert take(telling, happened(boots, pending, image))[-1] == "STEP_STARTED"
    agent, running = row(Status.STARTING, Phase.AGENT), row(Status.RUNNING)
    assert take(telling, boots.phase(agent)) == ["STEP_FINISHED", "STEP_STARTED"]
    assert take(telling, happened(boots, agent, running))[-1] == "STEP_FINISHED"
    assert telling.steps == []
    asked = row(Status.STOPPING, Phase.ASK)
    take(telling, happened(boots, running, asked))
    assert telling.steps == ["ask"]
    assert take(telling, happened(boots, asked, row(Status.STOPPED)))[-2:] == ["STEP_FINISHED", "RUN_FINISHED"]


@pytest.mark.parametrize("step", [None, "image", "agent"])
@pytest.mark.parametrize("now", [*Status, None])
def test_a_resumed_stream_is_valid_after_the_earlier_events(step: str | None, now: Status | None) -> None:
    telling = Telling()
    telling.running = True
    telling.steps = [step] if step else []
    for booted in (1, 2):
        boots = Boots("t", "r", lambda: "next")
        boots.resume(1, step)
        is_row = row(now, Phase.AGENT if now is Status.STARTING else Phase.NONE, booted=booted) if now else None
        seen = Telling()
        seen.running, seen.steps = True, list(telling.steps)
        types = take(seen, boots.catch_up(is_row))
        assert types[0] == "STATE_SNAPSHOT"
        up = now in (Status.STARTING, Status.RUNNING, Status.PAUSED, Status.STOPPING, Status.DELETING)
        assert seen.running == up
        assert ("RUN_STARTED" in types) == (up and booted == 2)


def test_with_once_there_is_one_run() -> None:
    telling, boots = Telling(), Boots("t", "r", lambda: "next", once=True)
    starting, crashed = row(Status.STARTING), row(Status.CRASHED, reason=Reason("why", "because"))
    take(telling, boots.catch_up(starting))
    assert take(telling, happened(boots, starting, crashed))[-1] == "RUN_ERROR"
    assert boots.over
    assert take(telling, happened(boots, crashed, starting)) == []
    assert take(telling, boots.end()) == []
