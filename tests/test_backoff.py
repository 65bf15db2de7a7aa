"""Pauses between tries double up to a limit, and start over after a try that lasted."""

from __future__ import annotations

import trio
import trio.testing

from volant.concurrency import Backoff


async def test_pauses_double_up_to_the_limit(autojump_clock: trio.testing.MockClock) -> None:
    backoff, pauses = Backoff(1.0, 5.0), []
    for _ in range(4):
        began = trio.current_time()
        await backoff.pause()
        pauses.append(trio.current_time() - began)
    assert pauses == [1.0, 2.0, 4.0, 5.0]
    backoff.reset()
    assert backoff.next_s == 1.0


async def test_a_try_that_lasts_starts_over(autojump_clock: trio.testing.MockClock) -> None:
    backoff = Backoff(1.0, 60.0, steady_s=10.0)
    await backoff.pause()
    await trio.sleep(9.0)
    assert backoff.next_s == 2.0
    await trio.sleep(1.0)
    assert backoff.next_s == 1.0
