"""Boots wait for a slot in the order of arrival; a boot under way is never delayed."""

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
        self.limiter = BootLimiter(limit, self.projection)
        self.entered: list[int] = []
        self._nursery = nursery
        self._scopes: dict[int, trio.CancelScope] = {}

    async def come(self, *ids: int) -> None:
        for vm_id in ids:
            self._nursery.start_soon(self._enter, vm_id)
            await trio.testing.wait_all_tasks_blocked()

    async def leave(self, vm_id: int) -> None:
        self.limiter.release(vm_id)
        await trio.testing.wait_all_tasks_blocked()

    async def cancel(self, vm_id: int) -> None:
        self._scopes[vm_id].cancel()
        await trio.testing.wait_all_tasks_blocked()

    async def _enter(self, vm_id: int) -> None:
        with trio.CancelScope() as self._scopes[vm_id]:
            await self.limiter.acquire(vm_id)
            self.entered.append(vm_id)


async def test_boots_get_slots_in_order_of_arrival(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery)
    await crowd.come(1, 2, 3, 4, 5)
    assert crowd.entered == [1, 2]
    assert crowd.limiter.inspect(5) == {"state": "waiting", "ahead": 2, "limit": 2}
    await crowd.leave(2)
    assert crowd.entered == [1, 2, 3]
    # Nobody passes those who wait.
    await crowd.come(6)
    await crowd.leave(1)
    await crowd.leave(3)
    assert crowd.entered == [1, 2, 3, 4, 5]
    assert crowd.limiter.statistics() == {"limit": 2, "booting": 2, "waiting": 1}


async def test_the_boot_that_is_due_the_longest_is_next(nursery: trio.Nursery) -> None:
    limiter = BootLimiter(1)
    served: list[int] = []

    async def boot(vm_id: int, due_at: float) -> None:
        await limiter.acquire(vm_id, due=(due_at, vm_id))
        served.append(vm_id)

    # The later a VM was created, the sooner it was prepared.
    for vm_id in (1, 5, 4, 3, 2):
        nursery.start_soon(boot, vm_id, float(vm_id // 2))
        await trio.testing.wait_all_tasks_blocked()
    assert limiter.inspect(5) == {"state": "waiting", "ahead": 3, "limit": 1}
    for vm_id in (1, 2, 3, 4):
        limiter.release(vm_id)
        await trio.testing.wait_all_tasks_blocked()
    assert served == [1, 2, 3, 4, 5]


async def test_a_cancelled_boot_leaves_the_queue(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 3)
    await crowd.cancel(2)
    assert crowd.limiter.inspect(2) is None
    await crowd.leave(1)
    assert crowd.entered == [1, 3]


async def test_a_boot_cancelled_at_its_slot_passes_it_on(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 3)
    crowd.limiter.release(1)
    crowd._scopes[2].cancel()
    await trio.testing.wait_all_tasks_blocked()
    # Whichever was heard, the turn is not lost.
    crowd.limiter.release(2)
    await trio.testing.wait_all_tasks_blocked()
    assert crowd.entered[-1] == 3


async def test_a_running_boot_gets_a_slot_at_once(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2)
    crowd.limiter.force(7)
    crowd.limiter.force(7)
    assert crowd.limiter.inspect(7) == {"state": "booting", "limit": 1}
    await crowd.leave(1)
    assert crowd.entered == [1]
    await crowd.leave(7)
    assert crowd.entered == [1, 2]


async def test_a_boot_keeps_its_slot_for_the_next_try(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 1)
    assert crowd.entered == [1, 1]


async def test_no_boot_gets_a_slot_while_the_daemon_drains(nursery: trio.Nursery) -> None:
    crowd = Crowd(nursery, limit=1)
    await crowd.come(1, 2, 3)
    crowd.projection.set_drain(Drain(since=datetime.now(UTC)))
    await crowd.come(4)
    await crowd.leave(1)
    assert crowd.entered == [1]
    assert crowd.limiter.inspect(2) == crowd.limiter.inspect(4) == {"state": "held", "limit": 1}
    assert crowd.limiter.statistics() == {"limit": 1, "booting": 0, "waiting": 3}
    await crowd.cancel(3)
    crowd.projection.set_drain(None)
    await trio.testing.wait_all_tasks_blocked()
    assert len(crowd.entered) == 2
    await crowd.leave(crowd.entered[-1])
    assert sorted(crowd.entered) == [1, 2, 4]
