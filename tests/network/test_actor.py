"""The actor `network` serves requests in batches, and answers each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec
import pytest
import trio

from actors import Ref
from tests.network.kit import INSTANCE, SETTINGS, keeper, stopped, vm
from tests.simulated import SimLinks, SimNetwork
from tests.simulated.dns import SimDns
from volant.egress import VmResolvers
from volant.model import EgressRule, VmRow, tap_of
from volant.network import Link, MakeBridge, NetworkFailed, Networks, Step
from volant.network.messages import Attach, Detach, Reconcile

T = TypeVar("T")
FOREVER_S = 1e6


@dataclass
class Bench:
    """A simulated host, and how long each call takes."""

    links: SimLinks = field(default_factory=SimLinks)
    rows: list[VmRow] = field(default_factory=list)
    takes_s: float = 0.01
    loads: int = 0
    refuses: Callable[[Step], bool] = lambda step: False
    firewall_refuses: bool = False

    def networks(self) -> Networks:
        return Networks(Door(self), SETTINGS, lambda: self.rows)

    @asynccontextmanager
    async def actor(self) -> AsyncIterator[Ref[Any]]:
        async with keeper(self.networks()) as network:
            yield network

    def taps(self) -> set[str]:
        return {name for name, link in self.links.links.items() if link.kind == "tun"}

    def guests(self) -> set[str]:
        """Returns the taps whose guests the firewall lets send."""
        guests = self.links.elements.get(f"bridge {SETTINGS.table} guests", {})
        return {key.split('"')[1] for key in guests}


class Door(SimNetwork):
    def __init__(self, bench: Bench) -> None:
        async def call(effect: Callable[[], T]) -> T:
            await trio.sleep(bench.takes_s)
            return effect()

        super().__init__(bench.links, call)
        self._bench = bench

    async def do(self, steps: Sequence[Step]) -> Sequence[NetworkFailed | None]:
        done: list[NetworkFailed | None] = []
        for step in steps:
            if self._bench.refuses(step):
                done.append(NetworkFailed("tap", f"{step} is refused"))
            else:
                done += await super().do([step])
        return done

    async def load(self, rules: str) -> None:
        self._bench.loads += 1
        if self._bench.firewall_refuses:
            raise NetworkFailed("firewall", "refused")
        await super().load(rules)


def tap(vm_id: int) -> str:
    return tap_of(INSTANCE, vm_id)


async def all_of(*calls: Callable[[], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)


async def test_attach_sets_up_tap_and_rules_and_detach_removes_them(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with bench.actor() as network:
        bench.rows = [vm(1), vm(2)]
        await network.ask(Attach(1), timeout_s=FOREVER_S)
        assert tap(1) in bench.taps() & bench.guests()

        bench.rows = [stopped(vm(1)), vm(2)]
        await network.ask(Detach(1), timeout_s=FOREVER_S)
        assert bench.taps() == bench.guests() == {tap(2)}


async def test_a_hundred_vms_at_once_change_the_firewall_a_few_times(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench()
    async with bench.actor() as network:
        bench.rows = [vm(number) for number in range(1, 101)]
        await all_of(*(partial(network.ask, Attach(row.id), timeout_s=FOREVER_S) for row in bench.rows))

        assert bench.taps() == bench.guests() == {tap(row.id) for row in bench.rows}
        assert bench.loads <= 4


async def test_the_start_repairs_what_an_earlier_daemon_left(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(rows=[vm(1), vm(2), vm(3)])
    await bench.networks().reconcile()
    bench.rows = [vm(2), vm(4)]
    del bench.links.links[tap(2)]

    async with bench.actor() as network:
        await network.ask(Reconcile(), timeout_s=FOREVER_S)

        assert bench.taps() == bench.guests() == {tap(2), tap(4)}


async def test_a_tap_in_use_is_kept_until_its_vm_is_adopted_or_detached(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench(rows=[vm(1)])
    async with bench.actor() as network:
        await network.ask(Attach(1), timeout_s=FOREVER_S)
        bench.links.links[tap(1)] = Link(name=tap(1), kind="tun", mac="", up=True, in_use=True)
        bench.rows = []
        await network.ask(Reconcile(), timeout_s=FOREVER_S)
        assert bench.taps() == {tap(1)}
        assert bench.guests() == set()
        assert network.inspect()["actor"]["left_in_use"] == (tap(1),)

        await network.ask(Detach(1), timeout_s=FOREVER_S)
        assert bench.taps() == set()


async def test_a_tap_that_fails_delays_no_other_vm(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench(refuses=lambda step: tap(2) in str(step))
    told: dict[int, str] = {}
    async with bench.actor() as network:
        bench.rows = [vm(number) for number in range(1, 5)]

        async def attach(vm_id: int) -> None:
            try:
                await network.ask(Attach(vm_id), timeout_s=FOREVER_S)
            except NetworkFailed as error:
                told[vm_id] = error.code

        await all_of(*(partial(attach, row.id) for row in bench.rows))

        assert told == {2: "tap"}
        assert bench.taps() == {tap(1), tap(3), tap(4)}


async def test_the_daemon_starts_without_a_firewall_and_retries(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench(rows=[vm(1)], firewall_refuses=True)
    async with bench.actor() as network:
        with pytest.raises(NetworkFailed, match="refused") as caught:
            await network.ask(Attach(1), timeout_s=FOREVER_S)
        assert caught.value.code == "firewall"
        assert bench.taps() == set()
        assert "refused" in network.inspect()["actor"]["failure"]

        bench.firewall_refuses = False
        await network.ask(Attach(1), timeout_s=FOREVER_S)
        assert bench.taps() == bench.guests() == {tap(1)}
        assert network.inspect()["actor"]["failure"] is None


async def test_a_failed_repair_is_retried_without_a_request(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(rows=[vm(1)], firewall_refuses=True)
    async with bench.actor():
        await trio.sleep(100)
        assert bench.loads > 1
        assert bench.guests() == set()
        bench.firewall_refuses = False
        await trio.sleep(100)

        assert bench.guests() == {tap(1)}
        done = bench.loads
        await trio.sleep(1000)
        assert bench.loads == done
    assert len([text for text in caplog.messages if "without a network" in text]) == 1


async def test_the_resolver_of_a_vm_ends_although_its_rules_were_never_loaded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    dns = SimDns()
    bench = Bench(rows=[vm(1, egress=(EgressRule(name="a.example"),))], firewall_refuses=True)

    async def allow(vm_id: int, name: str, addresses: Mapping[str, float]) -> None:
        raise AssertionError("no name is asked for")

    resolvers = VmResolvers(dns, (), allow)
    async with keeper(Networks(Door(bench), SETTINGS, lambda: bench.rows, None, resolvers)) as network:
        with pytest.raises(NetworkFailed, match="refused"):
            await network.ask(Attach(1), timeout_s=FOREVER_S)
        assert dns.open
        bench.rows, bench.firewall_refuses = [], False
        await network.ask(Reconcile(), timeout_s=FOREVER_S)
        assert dns.open == set()


@pytest.mark.parametrize("somebody_comes", [False, True])
async def test_a_failed_tap_of_a_running_vm_is_retried(
    somebody_comes: bool, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(rows=[vm(1), vm(2)])
    async with bench.actor() as network:
        await network.ask(Reconcile(), timeout_s=FOREVER_S)
        bench.refuses = lambda step: tap(2) in str(step)
        bench.links.take_away_bridges()
        await trio.sleep(100)
        assert bench.links.links[tap(1)].master == SETTINGS.bridge_name
        assert bench.links.links[tap(2)].master == ""
        assert network.inspect()["actor"]["without_tap"] == [2]

        if somebody_comes:
            # The other VM gets its tap, and the failed tap is not forgotten.
            bench.rows = [vm(1), vm(2), vm(3)]
            await network.ask(Attach(3), timeout_s=FOREVER_S)
            assert tap(3) in bench.taps()
        bench.refuses = lambda step: False
        await trio.sleep(100)

        assert bench.links.links[tap(2)].master == SETTINGS.bridge_name
        turns = network.inspect()["actor"]["batches"]
        await trio.sleep(1000)
        assert network.inspect()["actor"]["batches"] == turns
    assert len([text for text in caplog.messages if "VM 2 is without a network" in text]) == 1


async def test_the_firewall_forgets_a_vm_whose_bridge_was_never_made(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench(rows=[vm(1)], refuses=lambda step: isinstance(step, MakeBridge))
    async with bench.actor() as network:
        with pytest.raises(NetworkFailed):
            await network.ask(Attach(1), timeout_s=FOREVER_S)
        assert bench.guests() == {tap(1)}
        assert not bench.links.links
        bench.rows = [stopped(vm(1))]
        bench.refuses = lambda step: False
        await network.ask(Detach(1), timeout_s=FOREVER_S)
        assert bench.guests() == set()


async def test_tables_that_could_not_be_deleted_are_deleted_the_next_time() -> None:
    bench = Bench(rows=[vm(1)], takes_s=0.0)
    networks = bench.networks()
    await networks.reconcile()
    bench.rows, bench.firewall_refuses = [], True
    with pytest.raises(NetworkFailed):
        await networks.remove()
    assert (bench.links.links, bool(bench.links.tables)) == ({}, True)
    bench.firewall_refuses = False
    await networks.remove_unused()
    assert not bench.links.tables


async def test_the_next_request_retries_failed_taps_of_other_vms(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench(rows=[vm(1), vm(2)], refuses=lambda step: tap(2) in str(step))
    async with bench.actor() as network:
        with pytest.raises(NetworkFailed, match="refused"):
            await network.ask(Reconcile(), timeout_s=FOREVER_S)
        bench.refuses = lambda step: False
        bench.rows = [stopped(vm(1)), vm(2)]
        await network.ask(Detach(1), timeout_s=FOREVER_S)

        assert bench.taps() == {tap(2)}


async def test_the_failed_tap_of_a_deleted_vm_is_not_retried(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(rows=[vm(1)], refuses=lambda step: tap(1) in str(step))
    async with bench.actor() as network:
        with pytest.raises(NetworkFailed, match="refused"):
            await network.ask(Attach(1), timeout_s=FOREVER_S)
        bench.rows = []
        await trio.sleep(100)
        turns = network.inspect()["actor"]["batches"]
        await trio.sleep(1000)

        assert (network.inspect()["actor"]["batches"], network.inspect()["actor"]["without_tap"]) == (turns, [])


async def test_a_host_that_does_not_answer_is_a_timeout(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(takes_s=1000.0)
    async with bench.actor() as network:
        bench.rows = [vm(1)]
        with pytest.raises(NetworkFailed) as caught:
            await network.ask(Attach(1), timeout_s=FOREVER_S)
        assert caught.value.code == "timeout"
        assert trio.current_time() < 300


@pytest.mark.parametrize("rows", [[], [vm(1)]])
async def test_a_clean_stop_removes_the_network_unless_a_vm_runs(
    rows: list[VmRow], autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench(rows=[vm(1)])
    bench.links.links["eth0"] = Link(name="eth0", kind="", mac="", up=True)
    async with bench.actor() as network:
        await network.ask(Reconcile(), timeout_s=FOREVER_S)
        bench.rows = rows

    assert set(bench.links.links) == ({"eth0", SETTINGS.bridge_name, tap(1)} if rows else {"eth0"})
    assert bool(bench.links.tables) is bool(rows)


async def test_a_clean_stop_keeps_the_network_while_a_tap_is_open(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench(rows=[vm(1)])
    async with bench.actor() as network:
        await network.ask(Reconcile(), timeout_s=FOREVER_S)
        bench.links.links[tap(1)] = msgspec.structs.replace(bench.links.links[tap(1)], in_use=True)
        bench.rows = []

    assert bench.taps() == {tap(1)}
    assert bench.links.tables


async def test_a_daemon_without_vms_on_the_bridge_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(firewall_refuses=True, refuses=lambda step: True)
    async with bench.actor() as network:
        await network.ask(Reconcile(), timeout_s=FOREVER_S)
        await network.ask(Attach(1), timeout_s=FOREVER_S)
        await network.ask(Detach(1), timeout_s=FOREVER_S)

    assert bench.loads == 0
    assert bench.links == SimLinks()
