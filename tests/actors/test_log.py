"""One log, any number of readers, and a publisher that never waits."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import Gap, Log


def frames(*numbers: int) -> list[tuple[int, bytes]]:
    return [(number, b"%d" % number) for number in numbers]


def filled(count: int, **bounds: int) -> Log:
    log = Log(**{"max_frames": 100, "max_bytes": 1000} | bounds)
    for _ in range(count):
        log.append(b"%d" % (log.newest + 1))
    return log


async def test_a_cursor_reads_what_comes_after_it_in_one_go() -> None:
    log = filled(5)
    async with log.cursor(after=2) as cursor, log.cursor(after=log.newest) as late:
        assert await cursor.take(1000) == frames(3, 4, 5)
        with pytest.raises(trio.WouldBlock):
            cursor.take_nowait(1000)
        assert log.append(b"6") == 6
        assert await cursor.take(1000) == await late.take(1000) == frames(6)


async def test_a_byte_budget_bounds_a_take_but_one_frame_always_comes() -> None:
    log = Log(max_frames=10, max_bytes=100)
    for _ in range(4):
        log.append(b"x" * 10)
    async with log.cursor(after=0) as cursor:
        assert [seq for seq, _ in cursor.take_nowait(25)] == [1, 2]  # type: ignore[union-attr]  # no gap here
        assert [seq for seq, _ in cursor.take_nowait(1)] == [3]  # type: ignore[union-attr]  # no gap here


async def test_numbers_begin_at_next_seq() -> None:
    log = Log(max_frames=3, max_bytes=100, next_seq=42)
    assert (log.oldest, log.newest) == (42, 41)
    async with log.cursor(after=41) as cursor, log.cursor(after=7) as old:
        assert log.append(b"42") == 42
        assert await cursor.take(10) == frames(42)
        assert await old.take(10) == Gap(after=7, oldest=42, newest=42)
        assert await old.take(10) == frames(42)


@pytest.mark.parametrize("bounds", [{"max_frames": 3}, {"max_bytes": 3}])
async def test_a_slow_reader_gets_a_gap_and_goes_on(bounds: dict[str, int]) -> None:
    log = filled(2, **bounds)
    async with log.cursor(after=0) as cursor:
        assert await cursor.take(1) == frames(1)
        for number in range(3, 9):
            log.append(b"%d" % number)
        assert await cursor.take(100) == Gap(after=1, oldest=6, newest=8)
        assert await cursor.take(100) == frames(6, 7, 8)


async def test_closing_wakes_every_reader_after_it_has_read_the_rest(autojump_clock: MockClock) -> None:
    log = filled(2)
    ends = []

    async def read(after: int) -> None:
        async with log.cursor(after=after) as cursor:
            got = []
            while taken := await cursor.take(1):
                assert not isinstance(taken, Gap)
                got += taken
            ends.append(got)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, 0)
        nursery.start_soon(read, 2)
        await wait_all_tasks_blocked()
        log.append(b"3")
        log.close()
        log.close()
    assert sorted(ends) == [frames(1, 2, 3), frames(3)]
    with pytest.raises(trio.ClosedResourceError):
        log.append(b"4")


async def test_a_burst_wakes_a_reader_once_and_a_cursor_that_never_reads_costs_nothing() -> None:
    log = filled(0, max_frames=10_000, max_bytes=10**6)
    takes: list[int] = []

    async def read() -> None:
        async with log.cursor(after=0) as cursor:
            while taken := await cursor.take(10**6):
                assert not isinstance(taken, Gap)
                takes.append(len(taken))

    async with log.cursor(after=0), trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        for _ in range(1000):
            log.append(b"x")
        await wait_all_tasks_blocked()
        assert takes == [1000]
        figures = log.statistics()
        assert (figures.cursors, figures.slowest_lag, figures.tasks_waiting) == (2, 1000, 1)
        assert (figures.frames, figures.bytes, figures.appended) == (1000, 1000, 1000)
        log.close()
    assert log.statistics().cursors == 0


async def test_a_take_that_is_cancelled_has_taken_nothing_and_a_reader_always_yields(autojump_clock: MockClock) -> None:
    log = filled(1)
    async with log.cursor(after=0) as cursor:
        with trio.CancelScope() as scope:
            scope.cancel()
            await cursor.take(100)
        assert scope.cancelled_caught
        assert await cursor.take(100) == frames(1)
        with trio.move_on_after(5) as scope:
            await cursor.take(100)
        assert scope.cancelled_caught
        log.append(b"2")
        assert await cursor.take(100) == frames(2)


def test_frames_beyond_the_bounds_are_refused() -> None:
    log = filled(3, max_bytes=5)
    with pytest.raises(ValueError, match="does not fit"):
        log.append(b"123456")
    assert log.append(b"12345") == 4
    assert (log.oldest, log.newest, log.statistics().bytes) == (4, 4, 5)
    with pytest.raises(ValueError, match="ahead"):
        log.cursor(after=5)
    with pytest.raises(ValueError, match="at least 1"):
        Log(max_frames=0, max_bytes=1)
