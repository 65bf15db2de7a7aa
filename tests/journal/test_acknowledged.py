"""A database that lacks acknowledged changes is reported, and its events get a new epoch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.journal.kit import ClockHost, running
from volant.journal import AddNetwork, EventGap
from volant.journal._acknowledged import Acknowledged, AcknowledgedFile, acknowledged_path
from volant.model import DEFAULT_PROJECT, CreateNetwork


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "volant.db"


def files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]


def keep(path: Path, kept: Path) -> None:
    """The database as it is on the disk now, while it is in use."""
    kept.mkdir()
    for file in files(path):
        shutil.copy(file, kept)


def put_back(path: Path, kept: Path) -> None:
    """Nothing that was committed later is there: neither in the file nor in its log."""
    for file in files(path):
        file.unlink(missing_ok=True)
        if (kept / file.name).exists():
            shutil.copy(kept / file.name, file)


async def test_the_loss_of_an_acknowledged_network_is_reported(path: Path, tmp_path: Path) -> None:
    """A change without an event: only its number tells of it."""
    async with running(path) as bench:
        await bench.create("one")
        newest = bench.store.events.newest
        keep(path, tmp_path / "kept")
        await bench.ask(AddNetwork(CreateNetwork(name="lan"), DEFAULT_PROJECT))
        assert bench.store.lost is None
    put_back(path, tmp_path / "kept")
    async with running(path) as bench:
        assert bench.store.lost is not None
        assert "1 changes without one" in bench.store.lost
        assert bench.store.events.epoch != newest.epoch
        async with bench.store.events.cursor(newest) as cursor:
            assert isinstance(await cursor.take(), EventGap)
        epoch = bench.store.events.epoch
        await bench.create("two")
    async with running(path) as bench:
        # Told once; from then on it is the database.
        assert (bench.store.lost, bench.store.events.epoch) == (None, epoch)
        assert {row.name for row in bench.store.projection.rows()} == {"one", "two"}


async def test_lost_events_are_counted_and_ids_are_not_used_again(path: Path, tmp_path: Path) -> None:
    async with running(path) as bench:
        await bench.create("one")
        keep(path, tmp_path / "kept")
        await bench.create("two")
        await bench.create("three")
    put_back(path, tmp_path / "kept")
    async with running(path) as bench:
        assert "2 events" in str(bench.store.lost)
        assert (await bench.create("four")).id == 4


async def test_the_loss_of_the_end_of_the_log_is_reported(path: Path, tmp_path: Path) -> None:
    """As `kill -9` and a disk that has lost its last writes leave it."""
    async with running(path) as bench:
        await bench.create("one")
        await bench.ask(AddNetwork(CreateNetwork(name="lan"), DEFAULT_PROJECT))
        keep(path, tmp_path / "kept")
        shutil.copy(acknowledged_path(path), tmp_path / "kept")
    for file in files(path):
        file.unlink(missing_ok=True)
    log = tmp_path / "kept" / "volant.db-wal"
    log.write_bytes(log.read_bytes()[:-4000])
    for file in (tmp_path / "kept").iterdir():
        shutil.copy(file, path.parent)
    path.with_name("volant.db-shm").unlink()
    async with running(path) as bench:
        assert "1 changes without one" in str(bench.store.lost)
        assert [row.name for row in bench.store.projection.rows()] == ["one"]


async def test_an_intact_database_and_one_without_the_file_report_no_loss(path: Path) -> None:
    for name in ("one", "two"):
        async with running(path) as bench:
            await bench.create(name)
            epoch = bench.store.events.epoch
            assert bench.store.lost is None
    # As an earlier version left it.
    acknowledged_path(path).unlink()
    async with running(path) as bench:
        assert (bench.store.lost, bench.store.events.epoch) == (None, epoch)
    for garbage in (b"", b"\0" * 512, b"nonsense" * 100):
        acknowledged_path(path).write_bytes(garbage)
        async with running(path) as bench:
            assert (bench.store.lost, bench.store.events.epoch) == (None, epoch)


async def test_another_database_in_its_place_is_reported(path: Path) -> None:
    async with running(path) as bench:
        await bench.create("one")
    for file in files(path):
        file.unlink(missing_ok=True)
    async with running(path) as bench:
        assert "it has others" in str(bench.store.lost)
        assert (await bench.create("two")).id == 2


def test_a_torn_write_leaves_the_previous_copy(path: Path) -> None:
    host = ClockHost()
    file = AcknowledgedFile(host, path)
    assert file.open() is None
    for seq in (1, 2, 3):
        file.write(Acknowledged("e", seq, 0, 0))
    file.close()
    whole = file.path.read_bytes()
    for at in range(256, 300):
        # Its third word is in the second place.
        file.path.write_bytes(whole[:at] + b"#" * (512 - at))
        again = AcknowledgedFile(host, path)
        assert again.open() == Acknowledged("e", 2, 0, 0)
        again.close()
