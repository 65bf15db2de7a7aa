"""Unused space is returned to the disk in small pieces, which delay neither commits nor readers."""

# ruff: noqa: ASYNC240, ASYNC110 - sizes of the test's own file, which another thread changes

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import apsw
import pytest
import trio

from tests.journal.kit import TIMEOUT_S, Bench, ClockHost, running
from volant.host._host import LinuxThreads
from volant.journal import EventGap, Retention, _database as database_module, _journal as journal_module

T = TypeVar("T")
OLD_EVENTS = 12_000


class Recorded(ClockHost, LinuxThreads):
    """Notes what the journal's thread does, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.threads = self

    async def run(self, call: Callable[..., T], *args: object) -> T:
        self.calls.append(getattr(call, "__name__", ""))
        return await super().run(call, *args)


async def grown(path: Path) -> int:
    """A database with a long history; its size."""
    async with running(path, host=ClockHost()) as bench:
        await bench.create("first")
    connection = apsw.Connection(str(path))
    epoch = connection.execute("SELECT value FROM meta WHERE key = 'epoch'").get
    with connection:
        first: bytes = connection.execute("SELECT frame FROM events WHERE seq = 1").get
        head, tail = first.replace(b'"message":"', b'"message":"' + b"x" * 700).split(f"{epoch}-1".encode())
        connection.executemany(
            "INSERT INTO events VALUES (?, 1758717296, 1, 'first', 'VM_CREATED', ?)",
            ((seq, head + f"{epoch}-{seq}".encode() + tail) for seq in range(2, OLD_EVENTS + 1)),
        )
    connection.close()
    return path.stat().st_size


def log_size(path: Path) -> int:
    return path.with_name("volant.db-wal").stat().st_size


def bites_of(host: Recorded) -> int:
    """How often the file was compacted or its log trimmed; the note of what was acknowledged is not of interest."""
    return sum(call in ("compact", "trim") for call in host.calls)


async def settled(host: Recorded, bench: Bench) -> None:
    """Until the journal has nothing left to tidy up."""
    with trio.fail_after(60):
        before = -1
        while before != len(host.calls) or bench.store.events.oldest.seq == 1:
            before = len(host.calls)
            await trio.sleep(0.3)


async def test_the_file_shrinks_after_retention_and_commits_wait_for_one_piece_at_most(
    path: Path,
) -> None:
    before = await grown(path)
    assert before > 10 * 2**20
    host = Recorded()
    async with running(path, host=host, retention=Retention(max_events=500)) as bench:
        waits: list[int] = []

        async def write() -> None:
            for number in range(40):
                came = len(host.calls)
                await bench.create(f"vm-{number}")
                bites = [call for call in host.calls[came:] if call in ("compact", "trim")]
                waits.append(len(bites))

        async def read() -> None:
            # Retention overtakes it, and says so; what comes has no hole that is not said.
            async with bench.store.events.cursor("oldest") as cursor:
                expected = 1
                while cursor.position != bench.store.events.newest:
                    taken = await cursor.take()
                    if isinstance(taken, EventGap):
                        assert taken.oldest.seq >= expected
                        expected = taken.oldest.seq
                        continue
                    assert [frame.seq for frame in taken] == list(range(expected, expected + len(taken)))
                    expected += len(taken)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(read)
        # One that begins while the request is on its way, and another while the answer is.
        assert max(waits) <= 3, waits
        await settled(host, bench)
        assert host.calls.count("compact") > 20
        assert path.stat().st_size < before / 8
        assert log_size(path) <= 17 * 2**20
        newest = bench.store.events.newest.seq
        assert newest - bench.store.events.oldest.seq < 600
        # Then it does nothing more.
        calls = bites_of(host)
        await trio.sleep(0.3)
        assert bites_of(host) == calls
    connection = apsw.Connection(str(path))
    assert connection.pragma("integrity_check") == "ok"
    assert connection.pragma("freelist_count") <= database_module._SLACK_PAGES
    connection.close()


async def test_a_reader_that_stays_lets_the_log_grow_until_it_leaves(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_LOG_BYTES", 100_000)
    monkeypatch.setattr(journal_module, "_COMPACT_EVERY", 20)
    async with running(path) as bench:
        await bench.create("first")
        reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM vms").get == 1
        # Nobody is refused or held up for more than a moment meanwhile.
        with trio.fail_after(TIMEOUT_S):
            for number in range(60):
                await bench.create(f"vm-{number}", labels={"x": "y" * 60})
        assert reader.execute("SELECT count(*) FROM vms").get == 1
        assert log_size(path) > 100_000
        reader.close()
        for number in range(20):
            await bench.create(f"later-{number}")
        with trio.fail_after(TIMEOUT_S):
            while log_size(path) > 100_000:
                await trio.sleep(0.02)
