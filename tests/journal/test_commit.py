"""Commit, then publish: a reply means that a change is durable, a refusal that nothing has changed."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import msgspec
import pytest
import trio

from actors import ActorDown
from actors.testing import kill
from tests.journal.kit import Bench, GatedHost, events_after, running, take, types
from tests.names import named
from volant.journal import (
    CommitSteps,
    CreateRow,
    DatabaseRefused,
    EnablePlugin,
    InstallPlugin,
    RemovePlugin,
    StaleRow,
)
from volant.model import (
    BASE,
    DEFAULT_PROJECT,
    Caller,
    Cause,
    CreateVm,
    IllegalTransition,
    Manifest,
    Phase,
    Problem,
    Status,
    Step,
    VmRow,
)


def content(path: Path) -> bytes:
    return path.read_bytes()


def on_disk(path: Path) -> list[VmRow]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [
            msgspec.json.decode(row, type=VmRow) for (row,) in connection.execute("SELECT row FROM vms ORDER BY id")
        ]
    finally:
        connection.close()


async def test_a_first_boot_begins_in_the_transaction_of_the_creation(path: Path) -> None:
    request = CreateVm(name="demo", cpu_cores=1, memory_mb=128)
    async with running(path) as bench:
        async with bench.store.events.cursor(None) as cursor:
            cause = Cause("create_vm", Caller("ann", "ann"), "r1")
            row = await bench.ask(CreateRow(request, DEFAULT_PROJECT, cause=cause, starts=True))
            # As if its actor had begun the boot a moment later.
            assert (row.status, row.phase, row.revision) == (Status.PENDING, Phase.NONE, 1)
            (now,) = bench.store.projection.rows()
            assert (now.status, now.phase, now.revision) == (Status.STARTING, Phase.IMAGE, 2)
            assert on_disk(path) == [now]
            frames = await take(cursor)
    assert [(frame.event.type, frame.event.status) for frame in frames] == [
        ("VM_CREATED", Status.PENDING),
        ("VM_STARTING", Status.STARTING),
    ]


async def test_a_reply_means_durable_visible_and_published(path: Path) -> None:
    async with running(path) as bench:
        async with bench.store.events.cursor(None) as cursor:
            row = await bench.create("demo", labels={"team": "a"})
            assert on_disk(path) == [row] == bench.store.projection.rows()
            assert bench.store.projection.get(named("demo")) is bench.store.projection.by_id(row.id)
            (frame,) = await take(cursor)
    assert (row.status, row.revision, row.id) == (Status.PENDING, 1, 1)
    assert (frame.event.type, frame.event.labels) == ("VM_CREATED", {"team": "a"})
    assert frame.sse == f"id: {frame.event.id}\nevent: VM_CREATED\ndata: ".encode() + frame.data + b"\n\n"
    assert bench.store.projection.last_event == bench.store.events.newest


async def test_a_commit_is_invisible_until_the_disk_has_confirmed_it(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench, trio.open_nursery() as nursery:
        begun, release = host.hold()
        answered: list[VmRow] = []

        async def create() -> None:
            answered.append(await bench.create("demo"))

        nursery.start_soon(create)
        await begun.wait()
        assert not answered
        assert bench.store.projection.rows() == []
        assert bench.store.events.newest.seq == 0
        release()
    assert [row.name for row in answered] == ["demo"]


async def test_every_change_of_status_has_one_event_and_other_changes_none(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("demo")
        row = await bench.to(row, Status.STARTING)
        row = await bench.phase(row, Phase.LAUNCH)
        row = await bench.to(row, Status.RUNNING, Status.STOPPING, Status.STOPPED)
        assert row.revision == 4
        await bench.delete(row)
        frames = await events_after(bench.store.events)
    assert types(frames) == [
        "VM_CREATED",
        "VM_STARTING",
        "VM_RUNNING",
        "VM_STOPPING",
        "VM_STOPPED",
        "VM_STOPPING",
        "VM_DELETED",
    ]
    assert [frame.seq for frame in frames] == list(range(1, 8))
    assert on_disk(path) == []


async def test_an_illegal_transition_is_refused_and_changes_nothing(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("demo")
        with pytest.raises(IllegalTransition):
            await bench.to(row, Status.STARTING, Status.PENDING)
        assert on_disk(path) == [row]
        assert bench.store.events.newest.seq == 1


async def test_a_stale_revision_is_refused_with_the_row_as_it_is(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("demo")
        newer = await bench.to(row, Status.STARTING)
        with pytest.raises(StaleRow) as refusal:
            await bench.to(row, Status.STOPPED)
        assert refusal.value.row == newer
        with pytest.raises(StaleRow) as refusal:
            await bench.ask(CommitSteps(99, 1, (Step(None, ""),)))
        assert refusal.value.row is None


async def test_a_step_with_the_row_of_another_vm_is_refused(path: Path) -> None:
    async with running(path) as bench:
        one, other = await bench.create("one"), await bench.create("other")
        with pytest.raises(ValueError, match="holds the row of VM"):
            await bench.ask(CommitSteps(one.id, 1, (Step(other, ""),)))
        assert await bench.ask(CommitSteps(one.id, 1, ())) == one


async def test_a_name_is_taken_until_its_vm_is_gone_and_an_id_is_never_used_again(path: Path) -> None:
    async with running(path) as bench:
        first = await bench.create("demo")
        with pytest.raises(Problem) as refusal:
            await bench.create("demo")
        assert (refusal.value.status, refusal.value.code) == (409, "name-taken")
        await bench.delete(first)
        second = await bench.create("demo")
        await bench.delete(second)
    async with running(path) as bench:
        third = await bench.create("demo")
    assert (first.id, second.id, third.id) == (1, 2, 3)


async def test_requests_at_once_share_transactions_and_their_order(path: Path) -> None:
    async with running(path) as bench, trio.open_nursery() as nursery:
        refused: list[int] = []

        async def create(name: str) -> None:
            try:
                await bench.create(name)
            except Problem as problem:
                refused.append(problem.status)

        for number in range(100):
            nursery.start_soon(create, f"vm-{number % 60}")
        await trio.lowlevel.checkpoint()
    assert refused == [409] * 40
    frames_ids = [row.id for row in bench.store.projection.rows()]
    assert frames_ids == list(range(1, 61))


async def test_commits_survive_a_restart_of_the_daemon(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("demo", env={"A": "b"}, ttl="30m")
        await bench.ask(InstallPlugin(Manifest(name="web"), DEFAULT_PROJECT))
        epoch = bench.store.events.epoch
    async with running(path) as bench:
        assert bench.store.projection.rows() == [row]
        assert set(bench.store.projection.plugins) == {named("web")}
        assert bench.store.events.epoch == epoch
        assert bench.store.projection.last_event == bench.store.events.newest
        assert types(await events_after(bench.store.events)) == ["VM_CREATED"]


async def test_a_new_database_has_a_new_epoch(tmp_path: Path) -> None:
    epochs = set()
    for name in ("a", "b"):
        async with running(tmp_path / name) as bench:
            epochs.add(bench.store.events.epoch)
    assert len(epochs) == 2


async def test_changed_waits_for_another_revision_or_the_end(path: Path) -> None:
    async with running(path) as bench, trio.open_nursery() as nursery:
        row = await bench.create("demo")
        projection = bench.store.projection
        seen: list[VmRow | None] = []

        async def follow() -> None:
            revision = row.revision
            while True:
                now = await projection.changed(row.id, revision)
                seen.append(now)
                if now is None:
                    return
                revision = now.revision

        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        await bench.delete(row)
    assert seen[-1] is None
    assert await projection.changed(99, 0) is None


# Plugins


async def test_a_plugin_is_installed_used_disabled_and_removed(path: Path) -> None:
    async with running(path) as bench:
        with pytest.raises(Problem) as refusal:
            await bench.create("demo", plugin="web")
        assert (refusal.value.status, refusal.value.field) == (404, "plugin")
        await bench.ask(InstallPlugin(Manifest(name="web", labels={"kind": "web"}), DEFAULT_PROJECT))
        with pytest.raises(Problem, match="already"):
            await bench.ask(InstallPlugin(Manifest(name="web"), DEFAULT_PROJECT))
        row = await bench.create("demo", plugin="web")
        assert row.labels == {"kind": "web"}
        with pytest.raises(Problem, match="in use by 1 VM: demo"):
            await bench.ask(RemovePlugin(named("web")))
        await bench.ask(EnablePlugin(named("web"), False))
        with pytest.raises(Problem) as refusal:
            await bench.create("other", plugin="web")
        assert (refusal.value.status, refusal.value.code) == (409, "plugin-disabled")
        await bench.delete(row)
        await bench.ask(RemovePlugin(named("web")))
        with pytest.raises(Problem) as refusal:
            await bench.ask(RemovePlugin(named("web")))
        assert refusal.value.status == 404
        assert not bench.store.projection.plugins


async def test_the_built_in_plugin_stays(path: Path) -> None:
    async with running(path) as bench:
        base = named(BASE.name)
        for message in (RemovePlugin(base), EnablePlugin(base, False), InstallPlugin(BASE, DEFAULT_PROJECT)):
            with pytest.raises(Problem) as refusal:
                await bench.ask(message)
            assert refusal.value.status == 409


# When the disk fails


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_is_a_503_and_loses_nothing(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("kept")
        with full_disk(path.with_name("volant.db-wal").stat().st_size):
            for name in ("lost", "lost-too"):
                with pytest.raises(Problem) as refusal:
                    await bench.create(name)
                assert refusal.value.status == 503
                assert refusal.value.code in ("journal-full", "journal-unwritable")
            assert types(await events_after(bench.store.events)) == ["VM_CREATED"]
            assert bench.store.projection.rows() == [row]
        other = await bench.create("lost")
        assert other.id == 2
        frames = await events_after(bench.store.events)
        assert [(frame.seq, frame.event.name) for frame in frames] == [(1, "kept"), (2, "lost")]
    assert on_disk(path) == [row, other]


async def test_a_slow_disk_is_a_503_at_the_deadline_and_its_late_commit_counts(path: Path) -> None:
    host, gate = GatedHost(), threading.Event()
    async with running(path, host=host, commit_deadline_s=0.05) as bench:

        def hang() -> None:
            assert gate.wait(10)

        host.before = hang
        with pytest.raises(Problem) as refusal:
            await bench.create("slow")
        assert refusal.value.code == "journal-slow"
        with pytest.raises(Problem) as refusal:
            await bench.create("other")
        assert refusal.value.code == "journal-slow"
        assert bench.store.projection.rows() == []
        async with bench.store.events.cursor(None) as cursor:
            gate.set()
            (frame,) = await take(cursor)
        assert frame.event.name == "slow"
        host.before = None
        with pytest.raises(Problem, match="already"):
            await bench.create("slow")


# When the actor crashes


async def alive(bench: Bench) -> None:
    with trio.fail_after(10):
        while True:
            try:
                await bench.ask(CommitSteps(0, 0, ()))
            except StaleRow:
                return
            except ActorDown:
                await trio.sleep(0.01)


async def test_a_crash_between_commit_and_reply_publishes_each_event_once(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench:
        async with bench.store.events.cursor("oldest") as cursor:
            await bench.create("one")
            begun, release = host.hold()
            async with trio.open_nursery() as nursery:

                async def create() -> None:
                    with pytest.raises(ActorDown):
                        await bench.create("two")

                nursery.start_soon(create)
                await begun.wait()
                kill(bench.system, "journal")
                release()
            await alive(bench)
            await bench.create("three")
            told = []
            while cursor.position != bench.store.events.newest:
                told += [(frame.seq, frame.event.name) for frame in await take(cursor)]
    assert told == [(1, "one"), (2, "two"), (3, "three")]
    assert [row.name for row in bench.store.projection.rows()] == ["one", "two", "three"]


async def test_an_error_that_is_not_the_disks_crashes_the_actor_which_loads_again(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench:
        row = await bench.create("one")

        def bug() -> None:
            raise ZeroDivisionError

        host.before = bug
        with pytest.raises(ActorDown):
            await bench.create("two")
        host.before = None
        await alive(bench)
        assert (await bench.create("two")).id == 2
        assert bench.store.projection.get(named("one")) == row


# Whose database it is


async def test_a_database_of_another_version_is_refused_and_not_touched(path: Path) -> None:
    async with running(path):
        pass
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", 1000)
    connection.close()
    before = content(path)
    with pytest.raises(DatabaseRefused, match="another version of Volant"):
        async with running(path):
            pass
    assert content(path) == before


async def test_a_file_of_another_program_is_refused_and_not_touched(
    path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    diary = tmp_path_factory.mktemp("diary") / "diary.txt"
    with diary.open("wb") as file:
        file.write(b"Dear diary, " * 1000)
    with pytest.raises(DatabaseRefused, match="damaged or no SQLite"):
        async with running(diary):
            pass
    assert content(diary) == b"Dear diary, " * 1000
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE diary (entry TEXT)")
    connection.close()
    with pytest.raises(DatabaseRefused, match="another program"):
        async with running(path):
            pass


async def test_the_database_is_private_and_syncs_each_commit(path: Path) -> None:
    async with running(path) as bench:
        await bench.create("demo")
        for file in path.parent.iterdir():
            assert file.stat().st_mode & 0o077 == 0, file
        connection = apsw.Connection(str(path))
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("application_id") == 0x566F6C61
        connection.close()
