"""Volumes in the journal: a row before the file, one writer or many readers, and none lost by a restore."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.journal.kit import Bench, running
from tests.journal.test_backup import keeping, restore
from tests.names import named
from volant.journal import (
    AbandonVolume,
    AdoptRow,
    BeginRemovalOfVolume,
    BeginSnapshot,
    BeginVolume,
    CommitSteps,
    FinishSnapshot,
    FinishVolume,
    ForgetVolume,
    ForkRow,
    ResizeRow,
    RestoreRow,
)
from volant.model import (
    DEFAULT_PROJECT,
    CloneVolume,
    CreateVolume,
    ForkVm,
    Problem,
    RestoreVm,
    Status,
    Step,
    TakeSnapshot,
    VmRow,
    Volume,
)


async def made(bench: Bench, name: str = "data", number: int = 1) -> Volume:
    begun = await bench.ask(BeginVolume(CreateVolume(name=name, size_mb=64), DEFAULT_PROJECT, f"{number:016x}"))
    assert begun.status == "creating"
    return await bench.ask(FinishVolume(named(name), begun.id))


async def launched(bench: Bench, row: VmRow) -> VmRow:
    """Commits that the VM gets a process, and that it runs."""
    row = await bench.to(row, Status.STARTING)
    tagged = msgspec.structs.replace(row, tag=f"volant-0000000000-{row.id}.1")
    after = await bench.ask(CommitSteps(row.id, row.revision, (Step(tagged, "launching"),)))
    assert after is not None
    return await bench.to(after, Status.RUNNING)


async def cleared(bench: Bench, row: VmRow) -> VmRow:
    """Commits that nothing of its process is left."""
    row = await bench.to(row, Status.STOPPING)
    gone = msgspec.structs.replace(row, tag="", status=Status.STOPPED)
    after = await bench.ask(CommitSteps(row.id, row.revision, (Step(gone, "stopped"),)))
    assert after is not None
    return after


async def refused(bench: Bench, name: str, *volumes: str) -> Problem:
    with pytest.raises(Problem) as problem:
        await bench.create(name, volumes=volumes)
    return problem.value


async def test_a_volume_has_a_row_before_its_file_and_outlives_the_daemon(path: Path) -> None:
    async with running(path) as bench:
        request = CreateVolume(name="data", size_mb=64, labels={"of": "me"})
        begun = await bench.ask(BeginVolume(request, DEFAULT_PROJECT, "a" * 16))
        assert (await refused(bench, "demo", "data:/d")).code == "volume-not-ready"
        with pytest.raises(Problem) as taken:
            await bench.ask(BeginVolume(CreateVolume(name="data", size_mb=64), DEFAULT_PROJECT, "b" * 16))
        assert taken.value.code == "volume-exists"
    async with running(path) as bench:
        assert bench.store.projection.volumes == {named("data"): begun}
        ready = await bench.ask(FinishVolume(named("data"), begun.id))
        row = await bench.create("demo", volumes=("data:/var/lib/app",))
        assert row.volumes[0].id == begun.id
    async with running(path) as bench:
        assert bench.store.projection.volumes == {named("data"): ready}
        assert bench.store.projection.require(named("demo")) == row


async def test_a_volume_that_a_vm_refers_to_is_not_removed(path: Path) -> None:
    async with running(path) as bench:
        volume = await made(bench)
        row = await bench.create("demo", volumes=("data:/d",))
        with pytest.raises(Problem) as used:
            await bench.ask(BeginRemovalOfVolume(named("data")))
        assert (used.value.status, "demo" in used.value.detail) == (409, True)
        await bench.delete(await bench.to(row, Status.STOPPED))
        assert (await bench.ask(BeginRemovalOfVolume(named("data")))).status == "deleting"
        assert (await refused(bench, "late", "data:/d")).code == "volume-not-ready"
        await bench.ask(ForgetVolume(named("data"), volume.id))
        assert bench.store.projection.volumes == {}
        assert (await refused(bench, "late", "data:/d")).code == "volume-not-found"


async def test_what_was_not_finished_is_abandoned_and_what_is_ready_stays(path: Path) -> None:
    async with running(path) as bench:
        volume = await made(bench)
        assert await bench.ask(AbandonVolume(named("data"), volume.id)) == volume
        await bench.ask(ForgetVolume(named("data"), volume.id))
        assert named("data") in bench.store.projection.volumes
        begun = await bench.ask(BeginVolume(CreateVolume(name="half", size_mb=64), DEFAULT_PROJECT, "b" * 16))
        abandoned = await bench.ask(AbandonVolume(named("half"), begun.id))
        assert abandoned is not None
        assert abandoned.status == "deleting"
        with pytest.raises(Problem):
            await bench.ask(FinishVolume(named("half"), begun.id))
        await bench.ask(ForgetVolume(named("half"), begun.id))
        assert await bench.ask(AbandonVolume(named("half"), begun.id)) is None


async def test_one_vm_writes_or_many_read(path: Path) -> None:
    async with running(path) as bench:
        await made(bench)
        writer = await launched(bench, await bench.create("writer", volumes=("data:/d",)))
        for volumes in ("data:/d", "data:/d:ro"):
            problem = await refused(bench, "other", volumes)
            assert (problem.status, problem.code) == (409, "volume-in-use")
            assert "'writer' writes" in problem.detail
        await cleared(bench, writer)
        one = await launched(bench, await bench.create("one", volumes=("data:/d:ro",)))
        two = await launched(bench, await bench.create("two", volumes=("data:/d:ro",)))
        assert "reads it" in (await refused(bench, "other", "data:/d")).detail
        await cleared(bench, one)
        await cleared(bench, two)
        again = await launched(bench, await bench.create("again", volumes=("data:/d",)))
        assert bench.store.projection.volumes[named("data")].writers == 2
        assert again.volumes[0].writers == 2


async def test_of_two_that_are_launched_together_one_gets_the_volume(path: Path) -> None:
    async with running(path) as bench:
        await made(bench)
        one = await bench.to(await bench.create("one", volumes=("data:/d",)), Status.STARTING)
        stopped = await bench.to(one, Status.CRASHED)
        two = await bench.to(await bench.create("two", volumes=("data:/d",)), Status.STARTING)
        one = await launched(bench, stopped)
        tagged = msgspec.structs.replace(two, tag=f"volant-0000000000-{two.id}.1")
        with pytest.raises(Problem) as late:
            await bench.ask(CommitSteps(two.id, two.revision, (Step(tagged, "launching"),)))
        assert late.value.code == "volume-in-use"
        # A VM that holds it goes on with other steps.
        assert (await bench.to(one, Status.PAUSED)).tag


async def test_nothing_writes_to_what_is_copied(path: Path) -> None:
    async with running(path) as bench:
        await made(bench)
        writer = await launched(bench, await bench.create("writer", volumes=("data:/d",)))
        clone = BeginVolume(CloneVolume(name="copy"), DEFAULT_PROJECT, "c" * 16, "data")
        with pytest.raises(Problem) as written:
            await bench.ask(clone)
        assert (written.value.code, written.value.vm) == ("volume-in-use", "writer")
        await cleared(bench, writer)
        copy = await bench.ask(clone)
        assert (copy.size_mb, copy.status) == (64, "creating")
        assert "copied to 'copy'" in (await refused(bench, "late", "data:/d")).detail
        await bench.create("reader", volumes=("data:/d:ro",))
        for message in (BeginRemovalOfVolume(named("data")), ResizeRow(named("data"), f"{1:016x}", 128)):
            with pytest.raises(Problem):
                await bench.ask(message)
        await bench.ask(FinishVolume(named("copy"), copy.id))
        await bench.create("other", volumes=("copy:/d",))


async def test_a_volume_never_shrinks(path: Path) -> None:
    async with running(path) as bench:
        volume = await made(bench)
        assert (await bench.ask(ResizeRow(named("data"), volume.id, 128))).size_mb == 128
        with pytest.raises(Problem) as shrink:
            await bench.ask(ResizeRow(named("data"), volume.id, 127))
        assert (shrink.value.status, shrink.value.field) == (409, "size_mb")


async def test_a_writer_is_not_copied_and_a_reader_only_fits_what_it_has_read(path: Path) -> None:
    async with running(path) as bench:
        await made(bench)
        writer = await launched(bench, await bench.create("writer", volumes=("data:/d",)))
        for message in (ForkRow(writer.id, ForkVm(), "fork-1"), BeginSnapshot(writer.id, TakeSnapshot(), "s1")):
            with pytest.raises(Problem) as written:
                await bench.ask(message)
            assert written.value.code == "volume-written"
        await cleared(bench, writer)
        reader = await launched(bench, await bench.create("reader", volumes=("data:/d:ro",)))
        (twin,) = await bench.ask(ForkRow(reader.id, ForkVm(names=["twin"]), "fork-1"))
        assert twin.volumes == reader.volumes
        await launched(bench, twin)
        await bench.ask(BeginSnapshot(reader.id, TakeSnapshot(name="warm"), "s1"))
        await bench.ask(FinishSnapshot(named("warm"), "s1", 1.0, 1))
        await bench.ask(RestoreRow(RestoreVm(name="again", from_snapshot="warm"), DEFAULT_PROJECT))
        for name in ("twin", "reader"):
            await cleared(bench, bench.store.projection.require(named(name)))
        await bench.to(bench.store.projection.require(named("again")), Status.STOPPED)
        await launched(bench, await bench.create("another", volumes=("data:/d",)))
        with pytest.raises(Problem) as changed:
            await bench.ask(RestoreRow(RestoreVm(name="late", from_snapshot="warm"), DEFAULT_PROJECT))
        assert changed.value.code == "volume-changed"


async def test_what_is_being_deleted_gets_no_user_and_a_repeated_deletion_completes_it(path: Path) -> None:
    async with running(path) as bench:
        data = await made(bench)
        reader = await launched(bench, await bench.create("reader", volumes=("data:/d:ro",)))
        await bench.ask(BeginSnapshot(reader.id, TakeSnapshot(name="warm"), "s1"))
        await bench.ask(FinishSnapshot(named("warm"), "s1", 1.0, 1))
        await bench.delete(reader)
        deleting = await bench.ask(BeginRemovalOfVolume(named("data")))
        with pytest.raises(Problem) as gone:
            await bench.ask(RestoreRow(RestoreVm(name="again", from_snapshot="warm"), DEFAULT_PROJECT))
        assert (gone.value.status, gone.value.code) == (409, "volume-changed")
        # An orphan that was adopted may have it, too.
        steps = [msgspec.structs.replace(reader, status=status) for status in (Status.PENDING, Status.STARTING)]
        await bench.ask(AdoptRow(tuple(Step(row, "adopted") for row in (*steps, reader))))
        assert await bench.ask(BeginRemovalOfVolume(named("data"))) == deleting
        await bench.ask(ForgetVolume(named("data"), data.id))
        assert not bench.store.projection.volumes


async def test_the_copies_of_volumes_become_ready_with_the_vm_that_they_are_for(path: Path) -> None:
    async with running(path) as bench:
        data = await made(bench)
        writer = await launched(bench, await bench.create("writer", volumes=("data:/d",)))
        await bench.ask(BeginSnapshot(writer.id, TakeSnapshot(name="then", volumes=True), "s1"))
        await bench.ask(FinishSnapshot(named("then"), "s1", 1.0, 1))
        copy = await bench.ask(BeginVolume(CreateVolume(name="again-data", size_mb=64), DEFAULT_PROJECT, "0" * 16))
        taken = RestoreVm(name="writer", from_snapshot="then")
        with pytest.raises(Problem):
            # The name is taken, so the volume stays what it was.
            await bench.ask(RestoreRow(taken, DEFAULT_PROJECT, volumes={data.id: copy}))
        assert {volume.name: volume.status for volume in bench.store.projection.volumes.values()} == {
            "data": "ready", "again-data": "creating",
        }  # fmt: skip
        free = RestoreVm(name="again", from_snapshot="then")
        row = await bench.ask(RestoreRow(free, DEFAULT_PROJECT, volumes={data.id: copy}))
        assert [str(mount) for mount in row.volumes] == ["again-data:/d"]
        assert {volume.status for volume in bench.store.projection.volumes.values()} == {"ready"}
        # The writer goes on, and both run.
        await launched(bench, row)
        # Without copies its volumes would be the writer's.
        with pytest.raises(Problem) as changed:
            await bench.ask(RestoreRow(RestoreVm(name="late", from_snapshot="then"), DEFAULT_PROJECT))
        assert changed.value.code in ("volume-in-use", "volume-changed")


async def test_a_restore_keeps_volumes_that_the_backup_lacks(path: Path, tmp_path: Path) -> None:
    async with keeping(path) as bench:
        old = await made(bench)
        kept = await bench.backup(tmp_path / "kept.db")
        await bench.ask(ResizeRow(named("data"), old.id, 512))
        late = await made(bench, "late", 2)
    restore(path, kept)
    async with keeping(path) as bench:
        grown = msgspec.structs.replace(old, size_mb=512)
        assert bench.store.projection.volumes == {named("data"): grown, named("late"): late}
