"""What `inspect` shows of a VM's egress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import trio

from tests.network.kit import vm
from volant.egress import EgressActivity, VmResolvers
from volant.network import EgressFilter


class _Silent:
    async def denied_connections(self) -> Mapping[int, int]:
        await trio.sleep_forever()
        raise AssertionError

    def denied_names(self, vm_id: int) -> list[Any]:
        return []


class _Counting:
    reads = 0

    async def denied_connections(self) -> Mapping[int, int]:
        self.reads += 1
        await trio.sleep(1)
        return {1: self.reads}


async def test_many_scrapes_read_the_firewall_once_in_a_while(autojump_clock: trio.testing.MockClock) -> None:
    rules = _Counting()
    activity = EgressActivity(cast(EgressFilter, rules), cast(VmResolvers, rules))
    found: list[Mapping[int, int]] = []

    async def scrape() -> None:
        found.append(await activity.denied_connections())

    for moment in (1, 2):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(scrape)
        assert found == [{1: moment}] * 10
        assert rules.reads == moment
        found.clear()
        await trio.sleep(5)


async def test_a_firewall_that_does_not_answer_in_time_is_named(autojump_clock: trio.testing.MockClock) -> None:
    silent = _Silent()
    activity = EgressActivity(cast(EgressFilter, silent), cast(VmResolvers, silent))
    found = await activity.describe(vm(1, egress="none"))
    assert found is not None
    assert found["problem"] == "the firewall can't be read: it takes too long"
