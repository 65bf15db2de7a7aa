"""What a guest says of its workload is reported at once, unless it says too much."""

from __future__ import annotations

import trio

from volant.session._workload import ReportLimit


async def test_few_reports_are_not_late_and_many_are_bounded(autojump_clock: trio.abc.Clock) -> None:
    limit = ReportLimit()
    began = trio.current_time()
    for _ in range(4):
        await limit.pause()
    assert trio.current_time() == began, "a program that starts and ends is reported as it does"
    for _ in range(200):
        await limit.pause()
    assert trio.current_time() - began > 1700
    await trio.sleep(300)
    quiet = trio.current_time()
    await limit.pause()
    assert trio.current_time() == quiet
