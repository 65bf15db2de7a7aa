"""`volar events` and `vms watch` go on after a lost connection, and say what is lost."""

from __future__ import annotations

import json

import pytest

from tests.cli.kit import volar
from tests.client.kit import event, problem, serving, sse

PATH = "GET /api/v1/events/vms"
GAP = 'event: STREAM_GAP\nid: e-8\ndata: {"type":"STREAM_GAP","requested":"e-3","oldest":"e-9","newest":"e-20"}'


@pytest.mark.parametrize("words", [("events", "--vm", "demo"), ("vms", "watch", "demo")])
async def test_events_resume_and_gaps_are_reported(words: tuple[str, ...]) -> None:
    async with serving() as server:
        server.routes[PATH] = [
            sse("retry: 10", event(2)),
            sse(GAP, event(9)),
            problem(410, "events-gone", "enough"),
        ]
        done = await volar(server, *words, "--since", "e-1", "--type", "VM_RUNNING", "--label", "a=b")
    assert done.code == 1
    assert [text.rpartition("message ")[2] for text in done.out.decode().splitlines()] == ["2", "9"]
    assert "events are lost" in done.err
    assert done.err.count("trying again") == 1
    first, second, third = server.asked("/api/v1/events/vms")
    assert dict(first.query) == {"vm": "demo", "types": "VM_RUNNING", "label": "a=b"}
    assert [request.headers["last-event-id"] for request in (first, second, third)] == ["e-1", "e-2", "e-9"]


async def test_json_is_a_line_for_each_event_and_gap() -> None:
    async with serving() as server:
        server.routes[PATH] = [sse(event(2), GAP, event(9)), problem(410, "events-gone", "enough")]
        done = await volar(server, "events", "--json", "--since", "0")
    items = [json.loads(text) for text in done.out.splitlines()]
    assert [item.get("id", item["type"]) for item in items] == ["e-2", "STREAM_GAP", "e-9"]
    assert json.loads(done.err)["error"]["code"] == "events-gone"
