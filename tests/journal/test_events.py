"""Events are delivered in order and without holes, or a gap reports their loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from tests.journal.kit import TIMEOUT_S, Bench, ClockHost, events_after, running, take
from volant.host import Host
from volant.host._host import LinuxThreads
from volant.journal import EventGap, EventLog, Retention, Store
from volant.model import EventId

T = TypeVar("T")


async def fill(bench: Bench, count: int) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(bench.create, f"vm-{bench.store.events.newest.seq}-{number}")


def small_ring(host: Host, path: Path) -> Store:
    store = Store(host, path)
    store.events = EventLog(host, path, ring_events=10)
    return store


async def test_a_reader_behind_the_ring_reads_the_database_and_then_the_ring(path: Path) -> None:
    async with running(path, store=small_ring(Host(), path)) as bench:
        await fill(bench, 700)
        frames = await events_after(bench.store.events)
        assert [frame.seq for frame in frames] == list(range(1, 701))
        assert {frame.event.id for frame in frames} == {f"{bench.store.events.epoch}-{n}" for n in range(1, 701)}
        assert bench.store.events.statistics().pages_read == 3
        again = await events_after(bench.store.events, frames[99].event.id)
        assert [frame.seq for frame in again] == list(range(101, 701))
        assert bench.store.events.statistics().pages_read == 3


async def test_a_frame_from_the_database_is_the_frame_that_was_published(path: Path) -> None:
    async with running(path) as bench:
        await fill(bench, 3)
        told = await events_after(bench.store.events)
    async with running(path) as bench:
        assert await events_after(bench.store.events) == told


async def test_many_readers_of_one_page_read_the_database_once(path: Path) -> None:
    async with running(path) as bench:
        await fill(bench, 300)
    async with running(path) as bench, trio.open_nursery() as nursery:

        async def read() -> None:
            assert len(await events_after(bench.store.events)) == 300

        for _ in range(50):
            nursery.start_soon(read)
    assert bench.store.events.statistics().pages_read == 2


async def test_the_take_of_one_reader_is_bounded_in_bytes(path: Path) -> None:
    async with running(path) as bench:
        await fill(bench, 20)
        async with bench.store.events.cursor("oldest") as cursor:
            taken = await cursor.take(max_bytes=1000)
            assert isinstance(taken, list)
            assert sum(len(frame.sse) for frame in taken) <= 1000
            assert len(taken) < 20


@pytest.mark.parametrize("after", ["nonsense", "", "abcd-1", "{epoch}-99", "{epoch}--1", "{epoch}-1e3"])
async def test_an_unknown_id_is_a_gap_followed_by_the_oldest_event(path: Path, after: str) -> None:
    async with running(path) as bench:
        await fill(bench, 2)
        log = bench.store.events
        asked = after.replace("{epoch}", log.epoch)
        async with log.cursor(asked) as cursor:
            gap = await cursor.take()
            assert gap == EventGap(asked, EventId(log.epoch, 1), EventId(log.epoch, 2)) == log.gap(asked)
            frames = await take(cursor)
            assert [frame.seq for frame in frames] == [1, 2]
    head, event, data = gap.sse.decode().removesuffix("\n\n").split("\n")
    assert (head, event) == (f"id: {log.epoch}-0", "event: STREAM_GAP")
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "STREAM_GAP",
        "requested": asked,
        "oldest": f"{log.epoch}-1",
        "newest": f"{log.epoch}-2",
    }


async def test_the_newest_id_and_the_one_before_the_oldest_are_no_gap(path: Path) -> None:
    async with running(path) as bench:
        log = bench.store.events
        assert log.gap(EventId(log.epoch, 0)) is None
        await fill(bench, 2)
        assert log.gap(log.newest) is None
        assert log.gap(str(EventId(log.epoch, 0))) is None


async def test_retention_by_count_keeps_the_newest_and_reports_the_gap(path: Path) -> None:
    retention = Retention(max_events=50)
    async with running(path, retention=retention) as bench:
        log = bench.store.events
        async with log.cursor("oldest") as sleeper, log.cursor(None) as reader:
            await fill(bench, 200)
            with trio.fail_after(20):
                while log.oldest.seq < 140:
                    await bench.create(f"more-{log.newest.seq}")
            assert 50 <= log.newest.seq - log.oldest.seq + 1 <= 60
            gap = await sleeper.take()
            assert isinstance(gap, EventGap)
            assert (gap.requested, gap.oldest) == (f"{log.epoch}-0", log.oldest)
            frames = await take(sleeper)
            assert frames[0].seq == log.oldest.seq
            assert isinstance(await reader.take(), EventGap)
        oldest = log.oldest
    async with running(path, retention=retention) as bench:
        assert bench.store.events.oldest >= oldest
        assert (await events_after(bench.store.events))[0].seq == bench.store.events.oldest.seq


async def test_retention_by_age_goes_on_in_the_sequence_even_when_all_are_old(path: Path) -> None:
    host = ClockHost()
    async with running(path, host=host) as bench:
        await fill(bench, 5)
        epoch = bench.store.events.epoch
    host.pass_time(days=8)
    async with running(path, host=host) as bench:
        log = bench.store.events
        with trio.fail_after(20):
            while log.oldest.seq < 5:  # noqa: ASYNC110 - it is the disk that tells
                await trio.sleep(0.05)
        await fill(bench, 1)
        assert [str(frame.event.id) for frame in await events_after(log)] == [f"{epoch}-5", f"{epoch}-6"]


async def test_closing_the_log_ends_its_readers_after_the_rest(path: Path) -> None:
    async with running(path) as bench:
        async with bench.store.events.cursor("oldest") as cursor:
            await fill(bench, 1)
            bench.store.events.close()
            assert len(await take(cursor)) == 1
            assert await cursor.take() == []
        # What is committed while the daemon stops is kept for those who come back.
        await fill(bench, 1)
        assert bench.store.events.newest.seq == 2


async def test_a_reader_that_does_not_read_holds_nothing(path: Path) -> None:
    async with running(path, store=small_ring(Host(), path)) as bench:
        async with bench.store.events.cursor(None):
            await fill(bench, 100)
            figures = bench.store.events.statistics()
            assert (figures.readers, figures.slowest_lag, figures.ring_oldest) == (1, 100, 91)
            assert len(bench.store.events._recent) == 10


class HeldHost(ClockHost, LinuxThreads):
    """What the journal's thread has done on the disk is known to nobody before `told` is set."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self._call = call
        self.done = trio.Event()
        self.told: trio.Event | None = None
        self.threads = self

    async def run(self, call: Callable[..., T], *args: object) -> T:
        result = await super().run(call, *args)
        if self.told is not None and getattr(call, "__name__", "") == self._call:
            self.done.set()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + TIMEOUT_S):
                await self.told.wait()
        return result


async def test_an_event_that_is_committed_and_not_published_is_invisible(path: Path) -> None:
    host = HeldHost("write")
    async with running(path, store=small_ring(host, path)) as bench:
        await fill(bench, 30)
        host.told = trio.Event()
        async with trio.open_nursery() as nursery, bench.store.events.cursor("oldest") as cursor:
            nursery.start_soon(bench.create, "late")
            await host.done.wait()
            seen = []
            while cursor.position != bench.store.events.newest:
                seen += [frame.seq for frame in await take(cursor)]
            assert seen == list(range(1, 31))
            host.told.set()
            assert [frame.event.name for frame in await take(cursor)] == ["late"]


async def test_a_reader_that_retention_overtakes_gets_a_gap(path: Path) -> None:
    async with running(path, store=small_ring(ClockHost(), path)) as bench:
        await fill(bench, 400)
    host = HeldHost("trim")
    store = small_ring(host, path)
    store.retention = Retention(max_events=100)
    async with running(path, store=store) as bench:
        host.told = trio.Event()
        async with bench.store.events.cursor("oldest") as cursor, trio.open_nursery() as nursery:
            await bench.create("one-more")
            await host.done.wait()
            taken: list[object] = []

            async def read() -> None:
                taken.append(await cursor.take())

            nursery.start_soon(read)
            await trio.sleep(0.05)
            assert not taken
            host.told.set()
        gap = taken[0]
        assert isinstance(gap, EventGap)
        assert gap.oldest.seq == 302
        assert (await take(cursor))[0].seq == 302
