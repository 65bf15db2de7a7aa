"""A journal without disk space refuses changes, reports why, and recovers by itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apsw
import pytest
import trio

from tests.journal.kit import ClockHost, running
from volant.host._disk import LinuxDisk
from volant.host._host import LinuxThreads
from volant.journal import AddNetwork, Store, _database as database_module, _journal as journal_module, _schema
from volant.journal._database import RESERVE_BYTES, Reserve
from volant.model import DEFAULT_PROJECT, CreateNetwork, Problem

T = TypeVar("T")


class SmallHost(ClockHost, LinuxDisk, LinuxThreads):
    """The real host, on a disk that is full whenever the test says so."""

    full = False

    def __init__(self) -> None:
        super().__init__()
        self.disk = self.threads = self

    def free(self, path: Path) -> int:
        return 0 if self.full else 2**40

    def reserve(self, path: Path, size: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().reserve(path, size)

    async def run(self, call: Callable[..., T], *args: object) -> T:
        if self.full and getattr(call, "__name__", "") == "write":
            raise apsw.FullError("database or disk is full")
        return await super().run(call, *args)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_PROBE_S", 0.02)
    monkeypatch.setattr(journal_module, "_PROBE_AT_LEAST_S", 0.05)


async def until(store: Store, *, is_well: bool) -> None:
    with trio.fail_after(30):
        while (store.trouble is None) != is_well:  # noqa: ASYNC110 - nothing tells of it
            await trio.sleep(0.01)


async def test_trouble_shows_while_changes_are_refused_and_ends_by_itself(path: Path) -> None:
    host = SmallHost()
    async with running(path, host=host) as bench:
        await bench.create("one")
        assert bench.store.trouble is None
        host.full = True
        # Also when nobody asks for a change.
        await until(bench.store, is_well=False)
        assert "is full" in str(bench.store.trouble)
        with pytest.raises(Problem) as refused:
            await bench.create("two")
        assert refused.value.code == "journal-full"
        host.full = False
        await until(bench.store, is_well=True)
        await bench.create("three")


async def test_a_start_without_space_uses_the_reserve_and_refuses_changes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = SmallHost()
    async with running(path, host=host) as bench:
        await bench.create("one")
    kept = Reserve(host, path).path
    assert kept.stat().st_blocks * 512 >= RESERVE_BYTES
    host.full = True
    really = _schema.open_writer

    def open_writer(host: SmallHost, at: Path) -> apsw.Connection:
        # As SQLite says it when there is no room for its index.
        if host.full and kept.exists():
            raise apsw.IOError("disk I/O error")
        return really(host, at)

    monkeypatch.setattr(database_module, "open_writer", open_writer)
    async with running(path, host=host) as bench:
        assert [row.name for row in bench.store.projection.rows()] == ["one"]
        assert not kept.exists()
        with pytest.raises(Problem) as refused:
            await bench.ask(AddNetwork(CreateNetwork(name="lan"), DEFAULT_PROJECT))
        assert (refused.value.status, refused.value.code) == (503, "journal-full")
        assert "is full" in str(bench.store.trouble)
        host.full = False
        await until(bench.store, is_well=True)
        assert kept.exists()
        await bench.create("two")


async def test_another_failure_of_the_disk_keeps_the_reserve(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = SmallHost()
    async with running(path, host=host) as bench:
        await bench.create("one")

    def open_writer(host: SmallHost, at: Path) -> apsw.Connection:
        raise apsw.IOError("disk I/O error")

    monkeypatch.setattr(database_module, "open_writer", open_writer)
    with pytest.raises(apsw.IOError):
        async with running(path, host=host):
            pass
    assert Reserve(host, path).path.exists()
