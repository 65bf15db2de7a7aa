"""A VM that goes on at this host: its row follows its snapshot, once, and counts for no limit a second time."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.journal.kit import running
from tests.journal.test_snapshots import running_vm
from tests.model.kit import LEAVING
from tests.names import named
from volant.journal import AddSnapshot, ArriveRow, BeginSnapshot, FinishSnapshot, RemoveSnapshot, RestoreRow, used_by
from volant.model import Desired, Problem, RestoreVm, Snapshot, Status, TakeSnapshot


async def test_a_vm_arrives_once(path: Path) -> None:
    async with running(path) as bench:
        there = msgspec.structs.replace(await running_vm(bench, env={"WORD": "x"}), name="web", leaving=LEAVING)
        arrived = Snapshot(id="s1", name=LEAVING.arrival, vm=there, created_at=there.created_at, move=LEAVING.id)
        await bench.ask(AddSnapshot(arrived))
        with pytest.raises(Problem) as refused:
            await bench.ask(ArriveRow(named(LEAVING.arrival), epoch=2))
        assert refused.value.code == "snapshot-not-ready"
        await bench.ask(FinishSnapshot(named(LEAVING.arrival), "s1", 12.5, 4096))
        row = await bench.ask(ArriveRow(named(LEAVING.arrival), epoch=2))
        assert (row.name, row.env, row.status, row.checkpoint) == ("web", {"WORD": "x"}, Status.PENDING, "snapshot-s1")
        assert row.id != there.id
        again = await bench.ask(ArriveRow(named(LEAVING.arrival), epoch=2))
        assert again == row
    async with running(path) as bench:
        assert bench.store.projection.by_id(row.id) == row


async def test_only_the_snapshot_of_a_move_lets_a_vm_arrive(path: Path) -> None:
    async with running(path) as bench:
        row = await running_vm(bench)
        await bench.ask(BeginSnapshot(row.id, TakeSnapshot(name="warm"), "id-warm"))
        await bench.ask(FinishSnapshot(named("warm"), "id-warm", 12.5, 4096))
        with pytest.raises(Problem) as refused:
            await bench.ask(ArriveRow(named("warm"), epoch=2))
        assert refused.value.code == "snapshot-not-found"


async def test_a_replica_has_no_events_and_counts_for_no_limit(path: Path) -> None:
    async with running(path) as bench:
        leaving = msgspec.structs.replace(LEAVING, replica=True)
        there = msgspec.structs.replace(await running_vm(bench), name="web", leaving=leaving)
        before = bench.store.projection.last_event
        replica = Snapshot(id="s1", name=leaving.arrival, vm=there, created_at=there.created_at, move=leaving.id)
        await bench.ask(AddSnapshot(replica))
        await bench.ask(FinishSnapshot(named(replica.name), "s1", 12.5, 4096))
        kept = bench.store.projection.snapshots
        assert [one.is_replica for one in kept.values()] == [True]
        assert used_by(there.project, (), (), kept.values()).snapshots == 0
        assert bench.store.projection.last_event == before
        row = await bench.ask(ArriveRow(named(replica.name), epoch=2))
        assert row.move is not None
        assert (row.move.state, row.arrived) == ("restored", leaving.id)
        await bench.ask(RemoveSnapshot(named(replica.name), "s2"))
        assert len(bench.store.projection.snapshots) == 1, "another one of that name"


async def test_the_disk_of_a_vm_at_rest_is_a_part_of_it(path: Path) -> None:
    async with running(path) as bench:
        leaving = msgspec.structs.replace(LEAVING, desired=Desired.STOPPED)
        there = msgspec.structs.replace(
            await running_vm(bench), name="web", leaving=leaving, status=Status.STOPPED, desired=Desired.STOPPED,
            process=None, tag="", layer="1-disk", boots=1,
        )  # fmt: skip
        disk = Snapshot(id="s1", name=LEAVING.arrival, vm=there, created_at=there.created_at, move=LEAVING.id)
        before = bench.store.projection.last_event
        await bench.ask(AddSnapshot(disk))
        await bench.ask(FinishSnapshot(named(disk.name), "s1", 0.0, 4096))
        assert (bench.store.projection.last_event, disk.is_listed) == (before, False)
        with pytest.raises(Problem) as refused:
            await bench.ask(RestoreRow(RestoreVm(name="copy", from_snapshot=disk.name), there.project))
        assert refused.value.code == "snapshot-not-found"
        row = await bench.ask(ArriveRow(named(disk.name), epoch=2))
        assert (row.status, row.desired, row.disk_from) == (Status.STOPPED, Desired.STOPPED, "snapshot-s1")
        with pytest.raises(Problem) as refused:
            await bench.ask(RemoveSnapshot(named(disk.name), "s1"))
        assert refused.value.code == "snapshot-in-use"
    async with running(path) as bench:
        assert bench.store.projection.by_id(row.id) == row
