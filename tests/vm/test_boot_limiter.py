"""Boots wait for a boot slot, in the order in which they came; a boot under way is never held up."""

from __future__ import annotations

from datetime import UTC, datetime

import trio
import trio.testing

from volant.journal import Projection
from volant.model import Drain
from volant.vm import BootLimiter


class Crowd:
    """VMs that compete for two boot slots."""

    def __init__(self, nursery: trio.Nursery, limit: int = 2) -> None:
        self.projection = Projection()
        self.boot_slots = BootLimiter(limit, self.projection)
        self.entered: list[int] = []
        self._nursery = nursery
        self._scopes: dict[int, trio.CancelScope] = {}

    async def come(self, *ids: int) -> None:
        for vm_id in ids:
            self._nursery.start_soon(self._enter, vm_id)
            await trio.testing.wait_all_tasks_blocked()

    async def leave(self, vm_id: int) -> None:
        self.boot_slots.release(vm_id)
        await trio.testing.wait_all_tasks_blocked()

    async def cancel(self, vm_id: int) -> None:
        self._scopes[vm_id].cancel()
        await trio.testing.wait_all_tasks_blocked()

    async def _enter(self, vm_id: int) -> None:
        with trio.CancelScope() as self._scopes[vm_id]:
            await self.boot_slots.acquire(vm_id)
            self.entered.append(vm_id)


async def test_those_who_come_first_boot_first(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery)
    await crowd.come(1, 2, 3, 4, 5)
    assert crowd.entered == [1, 2]
    assert crowd.boot_slots.inspect(5) == {"state": "waiting", "ahead": 2, "limit": 2}
    await crowd.leave(2)
    assert crowd.entered == [1, 2, 3]
    # Nobody passes those who wait.
    await crowd.come(6)
    await crowd.leave(1)
    await crowd.leave(3)
    assert crowd.entered == [1, 2, 3, 4, 5]
    assert crowd.boot_slots.statistics() == {"limit": 2, "booting": 2, "waiting": 1}


async def test_one_that_gives_up_waiting_loses_its_place_and_holds_up_nobody(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 3)
    await crowd.cancel(2)
    assert crowd.boot_slots.inspect(2) is None
    await crowd.leave(1)
    assert crowd.entered == [1, 3]


async def test_one_that_is_let_in_and_cancelled_at_once_passes_its_turn_on(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 3)
    crowd.boot_slots.release(1)
    crowd._scopes[2].cancel()
    await trio.testing.wait_all_tasks_blocked()
    # Whichever was heard, the turn is not lost.
    crowd.boot_slots.release(2)
    await trio.testing.wait_all_tasks_blocked()
    assert crowd.entered[-1] == 3


async def test_a_boot_that_is_under_way_has_its_turn_at_once(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2)
    crowd.boot_slots.force(7)
    crowd.boot_slots.force(7)
    assert crowd.boot_slots.inspect(7) == {"state": "booting", "limit": 1}
    await crowd.leave(1)
    assert crowd.entered == [1]
    await crowd.leave(7)
    assert crowd.entered == [1, 2]


async def test_one_that_has_its_turn_keeps_it_for_the_next_try(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 1)
    assert crowd.entered == [1, 1]


async def test_nobody_has_a_turn_while_the_daemon_drains(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 3)
    crowd.projection.set_drain(Drain(since=datetime.now(UTC)))
    await crowd.come(4)
    await crowd.leave(1)
    assert crowd.entered == [1]
    assert crowd.boot_slots.inspect(2) == crowd.boot_slots.inspect(4) == {"state": "held", "limit": 1}
    assert crowd.boot_slots.statistics() == {"limit": 1, "booting": 0, "waiting": 3}
    await crowd.cancel(3)
    crowd.projection.set_drain(None)
    await trio.testing.wait_all_tasks_blocked()
    assert len(crowd.entered) == 2
    await crowd.leave(crowd.entered[-1])
    assert sorted(crowd.entered) == [1, 2, 4]
