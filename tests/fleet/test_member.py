"""A host in its fleet: it leaves, or does not after all, and it does not know all at once."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from tests.simulated.etcd import SimulatedEtcd
from volant.fleet import Compare, Definitions, EtcdRefused, Fleet, FleetSettings, Step, Transaction, put
from volant.model import HostFacts, HostLoad, Key, Problem


class SlowEtcd(SimulatedEtcd):
    """Answers changes when it is let."""

    def __init__(self) -> None:
        super().__init__(Random(1))
        self.asked, self.answers = trio.Event(), trio.Event()

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        self.asked.set()
        await self.answers.wait()
        raise EtcdRefused("there is no space")


def member_of(etcd: SimulatedEtcd, vms: Callable[[], Collection[Key]] = list) -> Fleet:
    """Returns the part of a host in a fleet, which has not begun. `vms`: those that it has"""
    facts = HostFacts(address="h1:1", version="", architecture="", cpu_cores=1, memory_mb=1)

    async def take_number(number: int) -> None:
        await trio.lowlevel.checkpoint()

    return Fleet(
        etcd, FleetSettings(host="h1", id="01234567"), facts=lambda: facts, load=HostLoad,
        there={"vms": vms, "snapshots": list, "volumes": list}, rows=list,
        take_number=take_number, new_id=lambda: "1", now=lambda: datetime.now(UTC),
        boottime=trio.current_time, context=ssl.create_default_context(),
        # None of these tests changes a definition.
        definitions=lambda etcd, mirror: cast(
            Definitions, SimpleNamespace(trouble=None, keep=trio.sleep_forever, joined=trio.Event())
        ),
    )  # fmt: skip


async def test_a_host_that_could_not_leave_makes_changes_again(autojump_clock: Any) -> None:
    etcd = SlowEtcd()
    fleet = member_of(etcd)

    async def claim() -> str:
        with pytest.raises(Problem) as refused:
            async with fleet.names["vms"].claimed([Key("default", "web")]):
                pass
        return refused.value.detail

    async with trio.open_nursery() as nursery:
        nursery.start_soon(claim)
        await etcd.asked.wait()
        with trio.move_on_after(1) as given_up:
            await fleet.leave()
        assert given_up.cancelled_caught
        etcd.answers.set()
    assert not fleet.left
    assert "there is no space" in await claim()


async def test_a_host_that_is_not_known_yet_may_exist(autojump_clock: Any) -> None:
    """A daemon that has just started may have asked etcd who owns a VM, and not know the owner."""
    fleet = member_of(SimulatedEtcd(Random(1)))
    with pytest.raises(Problem) as unknown:
        fleet.reach("h2")
    assert (unknown.value.status, unknown.value.code) == (503, "fleet-unavailable")


async def test_a_host_that_knows_nothing_yet_does_not_say_that_it_is_not_drained(autojump_clock: Any) -> None:
    etcd = SimulatedEtcd(Random(1))
    await etcd.transact([], [put("draining/h1", b'{"since":"2026-01-02T03:04:05Z"}')])
    fleet = member_of(etcd)
    with pytest.raises(Problem) as unknown:
        fleet.moves()
    assert (unknown.value.status, unknown.value.code) == (503, "fleet-unavailable")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fleet.keep)
        while not fleet.is_known:
            await fleet.changed()
        assert fleet.moves().since == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        nursery.cancel_scope.cancel()
