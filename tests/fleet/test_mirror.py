"""A mirror of etcd, claims of names and signs of life, over all faults of a simulated etcd."""

from __future__ import annotations

import os
import sys
from functools import reduce
from operator import add

import trio

from actors.testing import Simulation, simulate
from tests.simulated.etcd import FAULTS, SimulatedEtcd
from volant.fleet import EtcdUnavailable, Mirror, Namespace, OutcomeUnknown, SignOfLife, absent, delete, put

RUNS = 95 if sys.version_info >= (3, 12) else 25
"""By hand, with `RUNS=5000` in the environment, more. On Python 3.11 one takes four times as long."""
WORK_S = 120.0
CALM_S = 120.0


async def claim(etcd: SimulatedEtcd, name: str, owner: str) -> bool:
    """Claims a name for good; returns whether it is the owner's. As a host has to do it: what nobody knows is read."""
    key = f"names/{name}"
    while True:
        try:
            if (await etcd.transact([absent(key)], [put(key, owner.encode())])).done:
                return True
        except EtcdUnavailable:
            await trio.sleep(0.1)
            continue
        except OutcomeUnknown:
            await trio.sleep(0.1)
        try:
            found = await etcd.get(key)
        except EtcdUnavailable:
            continue
        if found is not None:
            return found.value == owner.encode()


async def run(sim: Simulation) -> None:
    etcd = SimulatedEtcd(sim.rng)
    owners: dict[str, set[str]] = {}
    seen = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(etcd.run)
        sign = SignOfLife(etcd, "alive/h1", b"", ttl_s=15, now=trio.current_time)
        mirror = Mirror(Namespace(etcd, "k/"), trio.current_time)
        await nursery.start(mirror.keep)

        async def change() -> None:
            while True:
                key = f"k/a/{sim.rng.randrange(10)}"
                step = delete(key) if sim.rng.random() < 0.3 else put(key, b"%d" % sim.rng.randrange(1000))
                try:
                    await etcd.transact([], [step, put("other", b"")])
                except (EtcdUnavailable, OutcomeUnknown):
                    pass
                await trio.sleep(sim.rng.uniform(0, 1))

        async def take_names(owner: str) -> None:
            for number in range(20):
                if await claim(etcd, str(number), owner):
                    owners.setdefault(str(number), set()).add(owner)

        async def watch_mirror() -> None:
            nonlocal seen
            while True:
                await mirror.changed()
                if mirror.revision:
                    assert mirror.revision >= seen
                    seen = mirror.revision

        async def lose_quorum() -> None:
            while True:
                await trio.sleep(sim.rng.uniform(5, 60))
                etcd.lose_quorum()
                await trio.sleep(sim.rng.uniform(1, 30))
                etcd.regain_quorum()

        async def live() -> None:
            """Keeps the sign of life of a host whose daemon freezes now and then."""
            while True:
                with trio.move_on_after(sim.rng.uniform(10, 60)):
                    await sign.keep()
                await trio.sleep(sim.rng.uniform(0, 40))

        async def watch_sign() -> None:
            while True:
                # One that was lost is given again after seconds.
                await trio.sleep(0.5)
                if sign.until is not None and trio.current_time() < sign.until:
                    assert "alive/h1" in etcd.entries

        with trio.CancelScope() as work:
            async with trio.open_nursery() as workers:
                workers.start_soon(watch_mirror)
                workers.start_soon(watch_sign)
                workers.start_soon(live)
                for task in (change, change, change, lose_quorum):
                    workers.start_soon(task)
                async with trio.open_nursery() as claims:
                    for owner in ("h1", "h2", "h3"):
                        claims.start_soon(take_names, owner)
                await trio.sleep(WORK_S)
                work.cancel()
        sim.faults.turn_off()
        etcd.regain_quorum()
        await trio.sleep(CALM_S)
        there = {key: entry.value for key, entry in etcd.entries.items() if key.startswith("k/")}
        assert {f"k/a/{key}": entry.value for key, entry in mirror.section("a").items()} == there
        assert mirror.trouble is None
        assert "alive/h1" not in etcd.entries
        assert mirror.age_s is not None
        assert mirror.age_s <= 20
        assert {name: len(who) for name, who in owners.items()} == {str(number): 1 for number in range(20)}
        nursery.cancel_scope.cancel()


def test_a_mirror_ends_up_right_and_no_name_has_two_owners() -> None:
    reports = []
    for seed in range(int(os.environ.get("RUNS", RUNS))):

        async def main(sim: Simulation) -> None:
            await run(sim)
            reports.append(sim.faults.report())

        simulate(main, seed=seed, faults=FAULTS, limit_steps=5_000_000)
    together = reduce(add, reports)
    assert not together.never_fired
    assert not together.never_reached
