"""A backup is a consistent copy of a database in use. A restore takes effect completely or not at all."""

# ruff: noqa: ASYNC240 - small files of the test's own

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest
import trio

from actors import ONE_FOR_ONE, Child, Supervisor, open_system
from tests.journal.kit import Bench, ClockHost, events_after, executing, take
from tests.names import named
from volant.host import Host, Ownership
from volant.host._files import LinuxFiles
from volant.journal import (
    Backups,
    DatabaseRefused,
    EventGap,
    Evidence,
    Journal,
    Running,
    Store,
    restore_offline,
    take_over,
)
from volant.model import Networking, Problem, ProcessIdentity, Status

IDENTITY = ProcessIdentity(pid=4242, start_time=1, boot_id="b", tag="volant-test-1.3")
INSTANCE = "0" * 10


class Kept(Bench):
    """A journal, and its backups."""

    backups: Backups

    async def backup(self, to: Path) -> Path:
        async with self.backups.take() as taken:
            data = b""
            while piece := await taken.read():
                data += piece
        assert len(data) == taken.size
        assert hashlib.sha256(data).digest() == taken.sha256
        to.write_bytes(data)
        return to


@asynccontextmanager
async def keeping(path: Path, *, host: Host | None = None, networking: Networking | None = None) -> AsyncIterator[Kept]:
    """As the daemon does it: an unfinished restore is finished before the journal begins."""
    host = host or ClockHost()
    take_over(host, path)
    store = Store(host, path, networking=networking)
    child = Child("journal", lambda: Journal(store))
    async with open_system(Supervisor(ONE_FOR_ONE, intensity=5, period_s=60, children=[child])) as system:
        bench = Kept(system, store, system["journal"])
        bench.backups = Backups(host, store)
        yield bench


def restore(
    path: Path,
    file: Path,
    *,
    replace: bool = False,
    host: Host | None = None,
    evidence: Evidence | None = None,
    instance: str = INSTANCE,
) -> str:
    """Restores a backup; returns the new epoch."""
    done = restore_offline(host or ClockHost(), path, file, evidence or Evidence(), instance, replace=replace)
    return done.epoch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory / "volant.db"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept.db"


def names(path: Path) -> list[str]:
    """Databases in the directory, without what SQLite has beside an open one."""
    return sorted(file.name for file in path.parent.iterdir() if file.suffix == ".db")


def check(path: Path) -> list[str]:
    """The names of the VMs in a sound file."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    assert connection.pragma("integrity_check") == "ok"
    found = [name for (name,) in connection.execute("SELECT name FROM vms ORDER BY id")]
    connection.close()
    return found


async def test_a_backup_has_all_acknowledged_changes_and_commits_go_on(path: Path, kept: Path) -> None:
    async with keeping(path) as bench:
        for number in range(20):
            await bench.create(f"vm-{number}")
        made = 0
        over = trio.Event()

        async def write() -> None:
            nonlocal made
            while not over.is_set():
                await bench.create(f"later-{made}")
                made += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await bench.backup(kept)
            over.set()
        assert made
        found = check(kept)
        # One moment: no later VM without those before it, and as many events as VMs.
        later = [name for name in found if name.startswith("later-")]
        assert found[:20] == [f"vm-{number}" for number in range(20)]
        assert later == [f"later-{number}" for number in range(len(later))]
        connection = apsw.Connection(str(kept))
        assert connection.execute("SELECT count(*), max(seq) FROM events").get == (len(found), len(found))
        connection.close()
        assert names(path) == ["volant.db"]


async def test_a_restore_brings_rows_plugins_and_history_back_with_a_new_epoch(path: Path, kept: Path) -> None:
    async with keeping(path) as bench:
        one = await bench.create("one")
        await bench.delete(await bench.to(await bench.create("two"), Status.STARTING, Status.STOPPING, Status.STOPPED))
        await bench.backup(kept)
        old = bench.store.events.newest
        # After it: one goes, two more come and go. Their ids stay used.
        await bench.delete(await bench.to(one, Status.STARTING, Status.STOPPING, Status.STOPPED))
        for name in ("three", "four"):
            row = await bench.to(await bench.create(name), Status.STARTING, Status.STOPPING, Status.STOPPED)
            await bench.delete(row)
    epoch = restore(path, kept)
    async with keeping(path) as bench:
        assert [row.name for row in bench.store.projection.rows()] == ["one"]
        assert bench.store.projection.get(named("one")) == one
        assert bench.store.events.epoch == epoch != old.epoch
        assert (await bench.create("five")).id == 5
        # The history is there, under ids of the new epoch; whoever comes with an old id is told of a gap.
        frames = await events_after(bench.store.events)
        assert [frame.event.id for frame in frames] == [f"{epoch}-{n + 1}" for n in range(len(frames))]
        assert {frame.event.name for frame in frames} == {"one", "two", "five"}
        async with bench.store.events.cursor(old) as cursor:
            gap = await cursor.take()
            assert isinstance(gap, EventGap)
            assert (gap.requested, gap.oldest.epoch) == (str(old), epoch)
            assert len(await take(cursor)) > 0
        assert f"{path.stem}-before-{epoch}.db" in names(path)
    aside = path.with_name(f"{path.stem}-before-{epoch}.db")
    assert check(aside) == []


async def test_vms_in_backup_and_database_stay_as_they_are(path: Path, kept: Path) -> None:
    async with keeping(path) as bench:
        row = await bench.create("one")
        await bench.backup(kept)
        row = await bench.to(row, Status.STARTING, Status.RUNNING)
    epoch = restore(path, kept)
    async with keeping(path) as bench:
        assert bench.store.projection.get(named("one")) == row
        # The change of its status since the backup is an event, so that events and rows tell the same.
        last = (await events_after(bench.store.events))[-1].event
        assert (last.id.split("-")[0], last.name, last.status) == (epoch, "one", Status.RUNNING)


async def test_vms_missing_in_the_backup_lose_their_rows_only_with_replace(path: Path, kept: Path) -> None:
    async with keeping(path) as bench:
        await bench.create("old")
        await bench.backup(kept)
        await bench.create("new")
    with pytest.raises(Problem, match="does not know these VMs: new") as refused:
        restore(path, kept)
    assert refused.value.status == 409
    async with keeping(path) as bench:
        await bench.create("newer")
    restore(path, kept, replace=True)
    async with keeping(path) as bench:
        assert [row.name for row in bench.store.projection.rows()] == ["old"]
        assert (await bench.create("next")).id == 4


async def test_a_backup_of_another_daemon_with_the_same_ids_is_refused(path: Path, kept: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with keeping(other / "volant.db") as bench:
        await bench.create("theirs")
        await bench.backup(kept)
    async with keeping(path) as bench:
        await bench.create("ours")
    with pytest.raises(Problem, match="1 \\('ours' here, 'theirs' in the backup\\)") as refused:
        restore(path, kept, replace=True)
    assert refused.value.status == 409


async def test_a_process_of_a_later_boot_is_the_vm(path: Path, kept: Path, tmp_path: Path) -> None:
    """The database was lost, the backup is older than the newest boot: a second process would fight for the disk."""
    async with keeping(path) as bench:
        await bench.to(await bench.create("one"), Status.STARTING, Status.STOPPING, Status.STOPPED)
        await bench.create("two")
        await bench.backup(kept)
    fresh = tmp_path / "fresh" / "volant.db"
    fresh.parent.mkdir()
    evidence = Evidence(newest_id=9, running={1: Running(3, IDENTITY), 9: Running(1, IDENTITY)})
    restore(fresh, kept, evidence=evidence)
    async with keeping(fresh) as bench:
        row = bench.store.projection.get(named("one"))
        assert row is not None
        assert (row.status, row.tag, row.boots, row.process) == (Status.RUNNING, IDENTITY.tag, 3, IDENTITY)
        # Nothing on the host knows of an id above 9.
        assert (await bench.create("next")).id == 10


def _flip(data: bytearray) -> None:
    for page in range(4096, len(data), 4096):
        data[page + 5] ^= 0xFF


BROKEN: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "empty": (lambda data: data.clear(), "is empty"),
    "a text": (lambda data: data.__setitem__(slice(None), b"Dear diary, " * 1000), "no SQLite database"),
    "half": (lambda data: data.__delitem__(slice(len(data) // 2, None)), "damaged"),
    "flipped pages": (_flip, "damaged"),
    "the header alone": (lambda data: data.__delitem__(slice(100, None)), "damaged"),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_damaged_backup_is_refused_and_leaves_no_file(path: Path, kept: Path, how: str) -> None:
    damage, words = BROKEN[how]
    async with keeping(path) as bench:
        for number in range(50):
            await bench.create(f"vm-{number}")
        await bench.backup(kept)
    data = bytearray(kept.read_bytes())
    damage(data)
    kept.write_bytes(data)
    with pytest.raises(DatabaseRefused, match=words):
        restore(path, kept)
    assert names(path) == ["volant.db"]
    async with keeping(path) as bench:
        assert await bench.create("still-works")


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "another version's": (executing("PRAGMA user_version = 1000"), "another version of Volant"),
    "another program's": (executing("PRAGMA application_id = 7"), "another program"),
    "with a trigger": (
        executing("CREATE TRIGGER t AFTER INSERT ON vms BEGIN DELETE FROM vms; END"),
        "not those of volantd",
    ),
    "with a row that is none": (executing("INSERT INTO vms VALUES (99, 'default', 'x', 1, x'7b7d')"), "can't be read"),
    "with an event that is none": (
        executing("UPDATE events SET frame = x'7b7d' WHERE seq = 1"),
        "table events, row 1, can't be read",
    ),
}


@pytest.mark.parametrize("how", FOREIGN)
async def test_content_that_this_version_would_not_write_is_refused(path: Path, kept: Path, how: str) -> None:
    change, words = FOREIGN[how]
    async with keeping(path) as bench:
        await bench.create("one")
        await bench.backup(kept)
    change(kept)
    with pytest.raises(DatabaseRefused, match=words):
        restore(path, kept)


async def test_one_backup_at_a_time_and_none_that_fills_the_disk(
    path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ClockHost()
    free = 2**40
    monkeypatch.setattr(host.disk, "free", lambda path: free)
    async with keeping(path, host=host) as bench:
        await bench.create("one")
        async with bench.backups.take():
            with pytest.raises(Problem, match="another backup") as refused:
                await bench.backup(kept)
            assert refused.value.status == 409
        await bench.backup(kept)
        free = 2**20
        with pytest.raises(Problem, match="no room") as refused:
            await bench.backup(kept)
        assert (refused.value.status, refused.value.code) == (503, "no-space")
        assert names(path) == ["volant.db"]


async def test_a_cancelled_backup_leaves_no_file(path: Path) -> None:
    async with keeping(path) as bench:
        await bench.create("one")
        with trio.move_on_after(0) as scope:
            async with bench.backups.take():
                pass
        assert scope.cancelled_caught
        async with bench.backups.take() as taken:
            assert taken.size
        assert names(path) == ["volant.db"]


class Died(BaseException):
    pass


class MortalFiles(LinuxFiles):
    """The daemon dies before or after the n-th change of a name."""

    def __init__(self, dies_at: int) -> None:
        super().__init__(Ownership())
        self.left = dies_at

    def rename(self, path: Path, to: Path) -> None:
        self._pass()
        super().rename(path, to)
        self._pass()

    def unlink(self, path: Path) -> None:
        self._pass()
        super().unlink(path)

    def _pass(self) -> None:
        if self.left == 0:
            raise Died
        self.left -= 1


@pytest.mark.parametrize("clean", [True, False])
async def test_a_kill_during_a_restore_leaves_the_old_or_the_new_database(
    path: Path, kept: Path, tmp_path: Path, clean: bool
) -> None:
    async with keeping(path) as bench:
        await bench.create("old")
        await bench.backup(kept)
        await bench.create("not-in-it")
        if not clean:
            # As after `kill -9`: what was committed last is in the log alone.
            for name in ("volant.db", "volant.db-wal"):
                (tmp_path / name).write_bytes((path.parent / name).read_bytes())
    if not clean:
        for name in ("volant.db", "volant.db-wal"):
            (path.parent / name).write_bytes((tmp_path / name).read_bytes())
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    found = []
    for dies_at in range(20):
        for file in path.parent.iterdir():
            file.unlink()
        for name, data in before.items():
            (path.parent / name).write_bytes(data)
        host = ClockHost()
        host.files = MortalFiles(dies_at)
        whole = True
        try:
            restore(path, kept, replace=True, host=host)
        except Died:
            whole = False
        async with keeping(path) as bench:
            found.append([row.name for row in bench.store.projection.rows()])
        (aside,) = path.parent.glob("volant-before-*.db") if found[-1] == ["old"] else [path]
        assert check(aside) == ["old", "not-in-it"]
        if whole:
            break
    assert whole
    decided = found.index(["old"])
    assert 0 < decided < len(found) - 1
    assert found == [["old", "not-in-it"]] * decided + [["old"]] * (len(found) - decided)


async def test_a_disk_that_fails_at_the_last_step_leaves_the_old_database(path: Path, kept: Path) -> None:
    class FailingFiles(LinuxFiles):
        def rename(self, path: Path, to: Path) -> None:
            super().rename(path, to)
            raise OSError(5, "Input/output error")

    host = ClockHost()
    host.files = FailingFiles(Ownership())
    async with keeping(path) as bench:
        await bench.create("old")
        await bench.backup(kept)
    with pytest.raises(OSError, match="Input/output error"):
        restore(path, kept, host=host)
    async with keeping(path) as bench:
        await bench.create("new")
    async with keeping(path) as bench:
        assert [row.name for row in bench.store.projection.rows()] == ["old", "new"]


async def test_the_next_start_removes_files_of_killed_backups_and_restores(path: Path) -> None:
    async with keeping(path):
        pass
    for name in ("volant-copy-0f.db", "volant-copy-0f.db-journal"):
        (path.parent / name).write_bytes(b"x")
    (path.parent / "volant-copy-of-mine.db").write_bytes(b"x")
    async with keeping(path):
        assert names(path) == ["volant-copy-of-mine.db", "volant.db"]


def _cut_off(path: Path) -> None:
    """Leave the database as somebody does who is killed in the middle of a transaction without a write-ahead log."""
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "delete")
    connection.pragma("cache_spill", 1)
    connection.pragma("cache_size", 1)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE vms SET name = name || '-cut'")
    connection.execute("CREATE TABLE t (x)")
    for _ in range(200):
        connection.execute("INSERT INTO t VALUES (zeroblob(2000))")
    files = [path, path.with_name(path.name + "-journal")]
    data = [file.read_bytes() for file in files]
    connection.execute("ROLLBACK")
    connection.close()
    for file, content in zip(files, data, strict=True):
        file.write_bytes(content)


async def test_an_unfinished_transaction_is_no_damage(path: Path, kept: Path) -> None:
    async with keeping(path) as bench:
        await bench.create("old")
        await bench.backup(kept)
    _cut_off(path)
    async with keeping(path) as bench:
        assert [row.name for row in bench.store.projection.rows()] == ["old"]
    _cut_off(path)
    epoch = restore(path, kept)
    async with keeping(path) as bench:
        assert bench.store.events.epoch == epoch
        assert [row.name for row in bench.store.projection.rows()] == ["old"]
    assert check(path.with_name(f"volant-before-{epoch}.db")) == ["old"]
