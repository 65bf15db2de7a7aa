"""FairShare bounds the work for VMs in one pass of the event loop, and VMs share it evenly."""

from __future__ import annotations

import trio
import trio.testing

from volant.concurrency import FairShare


async def test_a_count_within_the_budget_does_not_wait() -> None:
    share = FairShare(100)
    with trio.CancelScope() as scope:
        scope.cancel()  # a wait would end here
        await share.take(1, 60)
        await share.take(2, 60)
    assert not scope.cancelled_caught


async def test_no_pass_moves_more_than_its_budget_and_one_piece() -> None:
    share = FairShare(100)
    moved: list[int] = []
    running = True

    async def relay(key: int) -> None:
        while running:
            await share.take(key, 40)
            moved[-1] += 40
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        moved.append(0)
        for key in range(20):
            nursery.start_soon(relay, key)
        for _ in range(200):
            moved.append(0)
            await trio.lowlevel.checkpoint()
        running = False
    # A pass may fall into two rounds of this task.
    assert max(moved[:-1]) <= 2 * (100 + 40)
    assert sum(moved) > 0


async def test_a_vm_with_many_streams_gets_no_more_than_one_with_one() -> None:
    share = FairShare(100)
    moved = {1: 0, 2: 0}
    running = True

    async def relay(key: int) -> None:
        while running:
            await share.take(key, 100)
            moved[key] += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(relay, 1)
        nursery.start_soon(relay, 2)
        while sum(moved.values()) < 400:
            await trio.lowlevel.checkpoint()
        running = False
    assert moved[2] > 0.3 * moved[1]


async def test_a_relay_that_is_cancelled_leaves_no_trace() -> None:
    share = FairShare(100)
    await share.take(1, 1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(share.take, 1, 10)
        nursery.start_soon(share.take, 2, 10)
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert share.statistics() == {"waiting": 0, "keys": 0}
