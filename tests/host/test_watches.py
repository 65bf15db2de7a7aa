"""Watches of files and directories."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from volant.host import Host
from volant.host._watches import LinuxWatches


async def test_no_write_is_missed_between_reading_and_waiting(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with host.watches.open(path) as watch, trio.fail_after(20):
        with path.open("ab") as file:
            file.write(b"1")
        await watch.wait()
        with trio.move_on_after(0.01) as scope:
            await watch.wait()
        assert scope.cancelled_caught, "one write wakes up once"
        with path.open("ab") as file:
            file.write(b"2")
        await watch.wait()


async def test_many_watches_share_one_reader_that_may_leave(host: Host, tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(5)]
    woken: list[int] = []
    scopes = [trio.CancelScope() for _ in paths]

    async def follow(number: int) -> None:
        with host.watches.open(paths[number]) as watch, scopes[number]:
            await watch.wait()
            woken.append(number)

    for path in paths:
        path.touch()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(follow, number)
            await trio.testing.wait_all_tasks_blocked()
            # Whoever it is that reads for all, two of them leave.
            scopes[0].cancel()
            scopes[1].cancel()
            await trio.testing.wait_all_tasks_blocked()
            for number in (3, 2, 4):
                paths[number].write_bytes(b"x")
    assert sorted(woken) == [2, 3, 4]
    assert isinstance(host.watches, LinuxWatches)
    assert not host.watches._by_wd


async def test_two_watches_of_one_file_both_wake_up(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with host.watches.open(path) as one, host.watches.open(path) as two, trio.fail_after(20):
        path.write_bytes(b"x")
        await one.wait()
        await two.wait()


async def test_a_watched_file_may_vanish(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with host.watches.open(path) as watch, trio.fail_after(20):
        path.unlink()
        with trio.move_on_after(0.01):
            await watch.wait()
    with pytest.raises(FileNotFoundError):
        with host.watches.open(path):
            pass
