"""Snapshots and forks over the wire: what is refused says why, what comes to nothing leaves nothing, once is once."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.api.kit import Api, Unanswered, until
from tests.names import named
from volant.images import ANYWHERE, fetch
from volant.journal import AdoptRow, BeginSnapshot, FinishSnapshot, ForkRow
from volant.model import Artifact, Boot, CreateVm, ForkVm, Manifest, Status, Step, TakeSnapshot, VmRow, new_row

NOW = datetime(2026, 1, 2, tzinfo=UTC)


async def said_to_run(served: Api, name: str = "demo", manifest: Manifest | None = None) -> VmRow:
    """The row of a VM that runs, of which there is nothing else."""
    manifest = manifest or Manifest(name="base", version="1")
    request = CreateVm(name=name, cpu_cores=1, memory_mb=128, plugin=manifest.name)
    row = new_row(request, manifest, vm_id=len(served.deps.store.projection) + 1, now=NOW)
    steps = [Step(msgspec.structs.replace(row, status=status), "so it is said")
             for status in (Status.PENDING, Status.STARTING, Status.RUNNING)]  # fmt: skip
    return await served.deps.journal.ask(AdoptRow(tuple(steps)), timeout_s=10)


async def kept(served: Api, name: str = "warm", **fields: Any) -> VmRow:
    """A snapshot of which there is nothing but the row; and the VM that it is of."""
    row = await said_to_run(served, **fields)
    await served.deps.journal.ask(BeginSnapshot(row.id, TakeSnapshot(name=name), "abc"), timeout_s=10)
    await served.deps.journal.ask(FinishSnapshot(named(name), "abc", 12.5, 4096), timeout_s=10)
    return row


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("vms/none/fork", {}, 404, None),
        ("vms/none/snapshots", {}, 404, None),
        ("vms/demo/fork", {}, 409, None),
        ("vms/demo/snapshots", {}, 409, None),
        ("vms/demo/fork", {"count": 0}, 400, "count"),
        ("vms/demo/fork", {"count": 33}, 400, "count"),
        ("vms/demo/fork", {"names": []}, 400, "names"),
        ("vms/demo/fork", {"names": ["a", "a"]}, 400, "names"),
        ("vms/demo/fork", {"names": ["a", "B"]}, 400, "names[1]"),
        ("vms/demo/fork", {"names": ["a"], "count": 2}, 400, "count"),
        ("vms/demo/snapshots", {"name": "No"}, 400, "name"),
        ("vms/demo/snapshots", {"labels": {"a=b": "c"}}, 400, "labels"),
        ("vms", {"from_snapshot": "none"}, 400, "name"),
        ("vms", {"from_snapshot": "none", "name": "new"}, 404, "from_snapshot"),
        ("vms", {"from_snapshot": "none", "name": "new", "env": {"A": "b"}}, 400, "env"),
        ("vms", {"from_snapshot": 7, "name": "new"}, 400, "from_snapshot"),
    ],
)
async def test_what_can_not_be_is_refused_and_says_why(
    served: Api, path: str, body: dict[str, object], status: int, field: str | None
) -> None:
    await served.crashed("demo")
    answer = await served.client.post(f"/api/v1/{path}", json=body)
    assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text
    assert len(served.deps.store.projection) == 1


async def test_a_snapshot_is_shown_used_and_removed(served: Api) -> None:
    row = await kept(served)
    (shown,) = (await served.client.get("/api/v1/snapshots")).json()
    assert (shown["name"], shown["status"], shown["vm"], shown["paused_ms"]) == ("warm", "ready", "demo", 12.5)
    assert (await served.client.get("/api/v1/snapshots/warm")).json() == shown
    assert (await served.client.get("/api/v1/vms/demo/snapshots")).json() == [shown]
    body: dict[str, object]
    for field, wrong in (("memory_mb", 256), ("cpu_cores", 2), ("plugin", "web")):
        body = {"name": "new", "from_snapshot": "warm", field: wrong}
        refused = await served.client.post("/api/v1/vms", json=body)
        assert (refused.status_code, refused.json()["field"]) == (400, field)
    body = {"name": "new", "from_snapshot": "warm", "memory_mb": row.memory_mb, "labels": {"a": "b"}}
    made = await served.client.post("/api/v1/vms?wait=crashed", json=body)
    assert (made.status_code, made.headers["volant-wait"]) == (201, "met"), made.text
    vm = made.json()
    assert (vm["memory_mb"], vm["labels"], vm["restart_policy"]) == (row.memory_mb, {"a": "b"}, "never")
    assert vm["origin"] == {
        "kind": "snapshot", "vm": "demo", "vm_id": row.id, "snapshot": "warm", "snapshot_id": "abc", "paused_ms": 12.5,
    }  # fmt: skip
    # Its files never were: no cold boot is made of what was to be a copy.
    assert vm["reason"]["code"] == "checkpoint_gone"
    assert (await served.client.delete("/api/v1/snapshots/warm")).status_code == 204
    for method in ("GET", "DELETE"):
        gone = await served.client.request(method, "/api/v1/snapshots/warm")
        assert (gone.status_code, gone.json()["type"]) == (404, "urn:volant:error:snapshot-not-found")
    assert (await served.client.get("/api/v1/snapshots")).json() == []


async def test_the_fork_tree_has_what_is_there_and_what_is_deleted_in_pages(served: Api) -> None:
    row = await kept(served)
    ask = ForkRow(row.id, ForkVm(names=["one", "two"]), "fork-a", paused_ms=3.5)
    copies = await served.deps.journal.ask(ask, timeout_s=10)
    await served.crashed("other")
    assert (await served.client.delete("/api/v1/snapshots/warm")).status_code == 204
    whole = (await served.client.get("/api/v1/forks")).json()
    origin, snapshot, *forks = whole["nodes"]
    assert (origin["id"], origin["kind"], origin["name"]) == (f"vm-{row.id}", "vm", "demo")
    assert (snapshot["id"], snapshot["kind"], snapshot["status"]) == ("snapshot-abc", "snapshot", None)
    assert snapshot["created_at"] <= snapshot["deleted_at"]
    assert [(fork["id"], fork["name"]) for fork in forks] == [(f"vm-{copy.id}", copy.name) for copy in copies]
    assert [(edge["kind"], edge["source"], edge["target"], edge["paused_ms"]) for edge in whole["edges"]] == [
        ("snapshot", origin["id"], "snapshot-abc", 12.5),
        ("fork", origin["id"], forks[0]["id"], 3.5),
        ("fork", origin["id"], forks[1]["id"], 3.5),
    ]
    assert whole["next_cursor"] is None
    nodes: list[Any] = []
    cursor: str | None = ""
    while cursor is not None:
        page = (await served.client.get(f"/api/v1/forks?limit=3&cursor={cursor}")).json()
        nodes, cursor = nodes + page["nodes"], page["next_cursor"]
    assert [node["id"] for node in nodes] == [node["id"] for node in whole["nodes"]]
    found = await tool(served, "forks_list", limit=2)
    assert (found["nodes"], found["next_cursor"]) == (whole["nodes"][:2], f"{row.id}-abc")
    for query, field in (("limit=0", "limit"), ("limit=1001", "limit"), ("cursor=x", "cursor")):
        wrong = await served.client.get(f"/api/v1/forks?{query}")
        assert (wrong.status_code, wrong.json()["field"]) == (400, field)


async def test_what_a_snapshot_needs_is_not_pruned(served: Api, tmp_path: Path) -> None:
    source = tmp_path / "kernel"
    source.write_bytes(b"a kernel")
    digest = hashlib.sha256(b"a kernel").hexdigest()
    fetch(tmp_path / "cache", str(source), digest, max_bytes=2**20, origins=ANYWHERE)
    manifest = Manifest(name="site", version="1", boot=Boot(kernel=Artifact(str(source), digest)))
    await kept(served, manifest=manifest)
    assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
    stray = tmp_path / "snapshots" / "snapshot-of-nobody"
    stray.mkdir(parents=True)
    (stray / "memory").write_bytes(b"x" * 5000)
    found = {item["name"]: item for item in (await served.client.get("/api/v1/system/df")).json()["items"]}
    assert (found[digest]["used_by"], found[digest]["reclaimable"]) == (["snapshot warm"], False)
    assert (found[stray.name]["kind"], found[stray.name]["reclaimable"]) == ("snapshot", True)
    pruned = (await served.client.post("/api/v1/system/prune")).json()
    assert not {digest, stray.name} & {item["name"] for item in pruned["items"]}
    pruned = (await served.client.post("/api/v1/system/prune?kind=snapshot")).json()
    assert [item["name"] for item in pruned["items"]] == [stray.name]
    assert not stray.exists()


async def test_a_failed_fork_creates_no_vm_and_leaves_nothing(served: Api, tmp_path: Path) -> None:
    await said_to_run(served)
    headers = {"Idempotency-Key": "once"}
    for _ in range(2):
        # It is not kept, as it may go well the next time.
        answer = await served.client.post("/api/v1/vms/demo/fork?wait=crashed", json={"count": 2}, headers=headers)
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:volant:error:fork-failed"), answer.text
    assert [vm["name"] for vm in (await served.client.get("/api/v1/vms")).json()] == ["demo"]
    assert list((tmp_path / "mem").iterdir()) == []
    told = [frame async for frame in events(served)]
    assert "VM_FORKED" not in told


async def test_a_name_that_is_taken_is_refused_before_anything_is_copied(served: Api) -> None:
    await said_to_run(served)
    answer = await served.client.post("/api/v1/vms/demo/fork", json={"names": ["demo"]})
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:volant:error:name-taken"), answer.text


async def test_a_failed_snapshot_leaves_nothing(served: Api, tmp_path: Path) -> None:
    await said_to_run(served)
    answer = await served.client.post("/api/v1/vms/demo/snapshots", json={"name": "warm"})
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:volant:error:snapshot-failed"), answer.text
    assert (await served.client.get("/api/v1/snapshots")).json() == []
    assert [*(tmp_path / "mem").iterdir(), *(tmp_path / "snapshots").glob("*")] == []


async def test_a_snapshot_whose_beginning_the_journal_has_not_confirmed_leaves_nothing(served: Api) -> None:
    await said_to_run(served)
    copies, projection = served.deps.vms.copies, served.deps.store.projection
    journal = copies.journal
    unanswered: Any = Unanswered(journal, BeginSnapshot)
    copies.journal = unanswered
    answer = await served.client.post("/api/v1/vms/demo/snapshots", json={"name": "warm"})
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:volant:error:journal-down"), answer.text
    await until(lambda: not projection.snapshots)
    copies.journal = journal
    answer = await served.client.post("/api/v1/vms/demo/snapshots", json={"name": "warm"})
    assert answer.json()["type"] == "urn:volant:error:snapshot-failed", answer.text


async def events(served: Api) -> AsyncIterator[str]:
    async with served.deps.store.events.cursor("oldest") as cursor:
        while cursor.position != served.deps.store.events.newest:
            taken = await cursor.take()
            assert isinstance(taken, list)
            for frame in taken:
                yield str(frame.event.type)


async def test_tools_copy_vms_and_report_failures(served: Api) -> None:
    await kept(served)
    found = await tool(served, "snapshots_list", vm="demo")
    assert ([one["name"] for one in found["snapshots"]], found["left_out"]) == (["warm"], 0)
    assert await tool(served, "vms_fork", vm="demo", names=["one", "two"]) is None
    restored = await tool(served, "vms_restore", name="three", from_snapshot="warm")
    assert (restored["outcome"], restored["vm"]["reason"]["code"]) == ("failed", "checkpoint_gone")
    # Its actor has looked by now: nothing runs.
    assert await tool(served, "vms_snapshot", vm="demo") is None
    assert (await tool(served, "snapshots_delete", snapshot="warm"))["deleted"] is True
    assert (await tool(served, "snapshots_list"))["snapshots"] == []


async def tool(served: Api, tool_name: str, /, **arguments: object) -> Any:
    """What a tool gives; None when it fails without."""
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool_name, "arguments": arguments}}
    headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-06-18"}
    answer = await served.client.post("/api/v1/mcp", json=message, headers=headers)
    assert answer.status_code == 200, answer.text
    text = answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        text = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")][-1]
    return msgspec.json.decode(text)["result"].get("structuredContent")
