"""Snapshots and forks in the journal: the row before any file, all copies or none, and one event for them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from tests.journal.kit import Bench, ClockHost, events_after, running, types
from tests.journal.test_backup import keeping, restore
from tests.names import named
from volant.journal import BeginSnapshot, CommitSteps, FinishSnapshot, ForkRow, RemoveSnapshot, RestoreRow
from volant.model import (
    DEFAULT_PROJECT,
    ForkVm,
    Problem,
    RestoreVm,
    Status,
    Step,
    TakeSnapshot,
    VmRow,
    snapshot_view,
)


async def running_vm(bench: Bench, name: str = "demo", **fields: object) -> VmRow:
    return await bench.to(await bench.create(name, **fields), Status.STARTING, Status.RUNNING)


async def snapshot_of(bench: Bench, row: VmRow, name: str = "warm") -> None:
    await bench.ask(BeginSnapshot(row.id, TakeSnapshot(name=name), f"id-{name}"))
    await bench.ask(FinishSnapshot(named(name), f"id-{name}", 12.5, 4096))


async def test_a_snapshot_has_a_row_before_its_files_and_outlives_its_vm(path: Path) -> None:
    host = ClockHost()
    async with running(path, host=host) as bench:
        row = await running_vm(bench, env={"WORD": "x"})
        begun = await bench.ask(BeginSnapshot(row.id, TakeSnapshot(description="before it"), "abcdef"))
        assert (begun.name, begun.status, begun.vm) == ("demo-20250924-123456-abcd", "creating", row)
        await bench.delete(row)
    async with running(path, host=host) as bench:
        assert bench.store.projection.snapshots[named(begun.name)] == begun
        ready = await bench.ask(FinishSnapshot(named(begun.name), "abcdef", 12.5, 4096))
        shown = snapshot_view(ready)
        assert (shown.status, shown.paused_ms, shown.size_bytes, shown.description) == (
            "ready",
            12.5,
            4096,
            "before it",
        )
    async with running(path, host=host) as bench:
        assert bench.store.projection.snapshots == {begun.key: ready}
        await bench.ask(RemoveSnapshot(named(begun.name), "abcdef"))
        await bench.ask(RemoveSnapshot(named(begun.name), "abcdef"))
        assert bench.store.projection.snapshots == {}
        with pytest.raises(Problem) as gone:
            await bench.ask(FinishSnapshot(named(begun.name), "abcdef", 12.5, 4096))
        assert gone.value.status == 404


async def test_only_running_and_paused_vms_can_be_copied(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("demo")
        for message in (BeginSnapshot(row.id, TakeSnapshot(), "a"), ForkRow(row.id, ForkVm(), "fork-a")):
            with pytest.raises(Problem) as refused:
                await bench.ask(message)
            assert (refused.value.status, refused.value.code) == (409, "vm-not-running")
        row = await bench.to(row, Status.STARTING, Status.RUNNING)
        await bench.ask(BeginSnapshot(row.id, TakeSnapshot(name="one"), "a"))
        with pytest.raises(Problem) as taken:
            await bench.ask(BeginSnapshot(row.id, TakeSnapshot(name="one"), "b"))
        assert (taken.value.status, taken.value.code) == (409, "snapshot-exists")


async def test_copies_are_created_together_with_an_event_of_their_original(path: Path) -> None:
    async with running(path) as bench:
        row = await running_vm(bench, labels={"team": "a"}, restart_policy="always", ttl="1h")
        await bench.create("demo-fork-2")
        newest = bench.store.events.newest
        copies = await bench.ask(ForkRow(row.id, ForkVm(count=3), "fork-a"))
        assert [copy.name for copy in copies] == ["demo-fork-1", "demo-fork-3", "demo-fork-4"]
        assert len({copy.id for copy in copies}) == 3
        for copy in copies:
            assert (copy.status, copy.checkpoint, copy.labels) == (Status.PENDING, "fork-a", {"team": "a"})
            assert (copy.restart_policy, copy.expires_at) == ("always", row.created_at + timedelta(hours=1))
            assert copy.origin is not None
            assert (copy.origin.kind, copy.origin.vm_id) == ("fork", row.id)
        frames = await events_after(bench.store.events, newest)
        assert types(frames) == ["VM_CREATED"] * 3 + ["VM_FORKED"]
        told = frames[-1].event
        assert (told.vm_id, told.status, told.copies) == (row.id, "running", tuple(copy.name for copy in copies))
        with pytest.raises(Problem) as taken:
            await bench.ask(ForkRow(row.id, ForkVm(names=["new", "demo-fork-1"]), "fork-b"))
        assert (taken.value.status, taken.value.code) == (409, "name-taken")
        assert bench.store.projection.get(named("new")) is None
        assert bench.store.projection.by_id(row.id) == row


async def test_a_vm_from_a_snapshot_has_its_members_and_an_event_once_it_runs(path: Path) -> None:
    async with running(path) as bench:
        row = await running_vm(bench, env={"WORD": "x"}, kernel_cmdline="quiet", labels={"team": "a"})
        await snapshot_of(bench, row)
        await bench.delete(row)
        request = RestoreVm(name="demo", from_snapshot="warm", labels={"new": "b"})
        made = await bench.ask(RestoreRow(request, DEFAULT_PROJECT))
        assert (made.cpu_cores, made.memory_mb, made.plugin) == (row.cpu_cores, row.memory_mb, row.plugin)
        assert (made.env, made.kernel_cmdline, made.labels) == ({"WORD": "x"}, "quiet", {"new": "b"})
        assert made.checkpoint == "snapshot-id-warm"
        with pytest.raises(Problem) as used:
            await bench.ask(RemoveSnapshot(named("warm"), "id-warm"))
        assert (used.value.status, used.value.code) == (409, "snapshot-in-use")
        newest = bench.store.events.newest
        made = await bench.to(made, Status.STARTING)
        assert made.checkpoint is not None
        runs = msgspec.structs.replace(made, status=Status.RUNNING, checkpoint=None)
        await bench.ask(CommitSteps(made.id, made.revision, (Step(runs, "the agent has answered"),)))
        frames = await events_after(bench.store.events, newest)
        assert types(frames) == ["VM_STARTING", "VM_RUNNING", "VM_RESTORED"]
        assert (frames[-1].event.snapshot, frames[-1].event.status) == ("warm", "running")
        shown = runs.view.origin
        assert shown is not None
        assert (shown.kind, shown.snapshot, shown.paused_ms) == ("snapshot", "warm", 12.5)
        await bench.ask(RemoveSnapshot(named("warm"), "id-warm"))


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({"from_snapshot": "none"}, 404, "from_snapshot"),
        ({"from_snapshot": "half"}, 409, "from_snapshot"),
        ({"memory_mb": 256}, 400, "memory_mb"),
        ({"cpu_cores": 2}, 400, "cpu_cores"),
        ({"plugin": "web"}, 400, "plugin"),
        ({"name": "demo"}, 409, "name"),
    ],
)
async def test_a_member_that_contradicts_the_snapshot_is_refused(
    path: Path, fields: dict[str, object], status: int, field: str
) -> None:
    async with running(path) as bench:
        row = await running_vm(bench)
        await snapshot_of(bench, row)
        await bench.ask(BeginSnapshot(row.id, TakeSnapshot(name="half"), "id-half"))
        wanted = RestoreVm(**{"name": "copy", "from_snapshot": "warm", **fields})  # type: ignore[arg-type]
        with pytest.raises(Problem) as refused:
            await bench.ask(RestoreRow(wanted, DEFAULT_PROJECT))
        assert (refused.value.status, refused.value.field) == (status, field)
        assert len(bench.store.projection) == 1


async def test_a_restore_keeps_present_snapshots(path: Path, tmp_path: Path) -> None:
    async with keeping(path) as bench:
        await bench.backup(tmp_path / "kept.db")
        row = await running_vm(bench)
        await snapshot_of(bench, row)
        await bench.delete(await bench.to(row, Status.STOPPING))
    restore(path, tmp_path / "kept.db")
    async with keeping(path) as bench:
        assert list(bench.store.projection.snapshots) == [named("warm")]
        assert len(bench.store.projection) == 0
