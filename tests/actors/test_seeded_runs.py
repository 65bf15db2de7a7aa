"""Under every schedule: the order of shutdown holds, no asker is lost, and a tree recovers when the faults are over."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import pytest
import trio

from actors import (
    ONE_FOR_ALL,
    ONE_FOR_ONE,
    PERMANENT,
    REST_FOR_ONE,
    TRANSIENT,
    Actor,
    ActorDown,
    Backoff,
    Child,
    DynamicSupervisor,
    NameTaken,
    NoSuchChild,
    Request,
    Started,
    StartTimeout,
    Supervisor,
    handles,
    open_system,
)
from actors.testing import kill

pytestmark = pytest.mark.slow

Simulate = Callable[[Callable[[Random], Awaitable[object]], int], object]
MANY = range(int(os.environ.get("ACTORS_SEEDS", "1000")))
FEW = range(min(200, len(MANY)))


def test_the_order_of_shutdown_is_reverse_under_outer_cancellation(simulate: Simulate) -> None:
    def actor(name: str, log: list[str], rng: Random) -> Actor:
        class Node(Actor):
            async def on_start(self) -> None:
                log.append(f"+{name}")
                self.ctx.stack.push_async_callback(self.close)
                for _ in range(3):
                    self.ctx.spawn(trio.sleep_forever)

            async def on_stop(self) -> None:
                await trio.sleep(rng.random())

            async def close(self) -> None:
                await trio.sleep(rng.random())
                log.append(f"-{name}")

        return Node()

    async def main(rng: Random) -> list[str]:
        async def function(name: str, *, task_status: Started) -> None:
            log.append(f"+{name}")
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                    await trio.sleep(rng.random())
                log.append(f"-{name}")

        log: list[str] = []
        names = iter("abcdefgh")

        def leaf() -> Child[Actor] | Child[None]:
            name = next(names)
            if rng.random() < 0.5:
                return Child(name, partial(actor, name, log, rng))
            return Child(name, partial(function, name))

        inner = Supervisor(children=[leaf() for _ in range(rng.randint(1, 3))])
        root = Supervisor(children=[leaf(), leaf(), Child("inner", inner), leaf(), leaf()])
        with trio.CancelScope() as scope:
            async with open_system(root, rng=rng):
                scope.cancel()
                await trio.sleep(rng.random())
        return log

    logs = set()
    for seed in MANY:
        log = simulate(main, seed)
        assert isinstance(log, list)
        starts, ends = log[: len(log) // 2], log[len(log) // 2 :]
        assert [name[1:] for name in reversed(starts)] == [name[1:] for name in ends], f"seed {seed}"
        logs.add("".join(log))
    assert len(logs) > 1


@dataclass(frozen=True)
class Work(Request[int]):
    number: int


class Server(Actor):
    mailbox = 4

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    @handles(Work)
    async def work(self, message: Work) -> int:
        luck = self.rng.random()
        if luck < 0.1:
            raise ValueError("unlucky")
        if luck < 0.2:
            self.ctx.spawn(self.fail)
        await trio.sleep(luck)
        return message.number

    async def fail(self) -> None:
        await trio.sleep(self.rng.random())
        raise ValueError("unlucky task")


def test_no_asker_is_lost_and_none_gets_the_answer_of_another(simulate: Simulate) -> None:
    async def main(rng: Random) -> tuple[str, ...]:
        outcomes: list[str] = []
        pool = DynamicSupervisor(intensity=1000, backoff=Backoff(base_s=0.2, cap_s=1))

        async def client(number: int) -> None:
            for n in range(10):
                question = number * 1000 + n
                patience_s = 30 if rng.random() < 0.9 else rng.random()
                timeout_s = rng.choice([math.inf, 60.0])
                try:
                    with trio.move_on_after(patience_s) as patience:
                        answer = await system[f"pool/{rng.randrange(3)}"].ask(Work(question), timeout_s=timeout_s)
                        assert answer == question
                        outcomes.append("answer")
                    if patience.cancelled_caught:
                        assert patience_s < 30, "nobody answered, and eight clients never wait that long"
                        outcomes.append("left")
                except ActorDown:
                    outcomes.append("down")
                    await trio.sleep(rng.random())

        async def killer() -> None:
            for _ in range(20):
                await trio.sleep(rng.random())
                kill(system, f"pool/{rng.randrange(3)}")

        async with open_system(Supervisor(children=[Child("pool", pool)]), rng=rng) as system:
            for n in range(3):
                restart = rng.choice([PERMANENT, TRANSIENT])
                await pool.start_child(Child(str(n), partial(Server, rng), restart))
            with trio.fail_after(1000):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(killer)
                    for number in range(8):
                        nursery.start_soon(client, number)
            for n in range(3):
                figures = system[f"pool/{n}"].inspect()["mailbox"]
                assert figures["depth"] == figures["askers_waiting_for_room"] == figures["replies_owed"] == 0
        assert len(outcomes) == 80
        return tuple(outcomes)

    seen = set()
    for seed in MANY:
        outcomes = simulate(main, seed)
        assert isinstance(outcomes, tuple)
        seen |= set(outcomes)
        if seed % 50 == 0:
            assert simulate(main, seed) == outcomes, f"seed {seed} is not the same twice"
    assert seen >= {"answer", "down", "left"}


class Flaky(Actor):
    """Fails to start, and crashes later, as long as there is chaos."""

    def __init__(self, chaos: list[float], rng: Random) -> None:
        self.chaos = chaos
        self.rng = rng

    async def on_start(self) -> None:
        await trio.sleep(self.rng.random())
        if self.rng.random() < self.chaos[0]:
            raise OSError("no start")
        if self.rng.random() < self.chaos[0]:
            self.ctx.spawn(self.fail)

    async def fail(self) -> None:
        await trio.sleep(self.rng.random() * 3)
        raise ValueError("crash")

    async def on_stop(self) -> None:
        await trio.sleep(self.rng.random())

    @handles(Work)
    async def work(self, message: Work) -> int:
        return message.number


def test_every_strategy_converges_once_the_faults_are_over(simulate: Simulate) -> None:
    async def main(rng: Random) -> int:
        chaos = [0.0]
        leaves: list[Child[Flaky]] = []

        def supervisor(depth: int) -> Supervisor:
            children: list[Child[Flaky] | Child[None]] = []
            for n in range(rng.randint(2, 4)):
                if depth and rng.random() < 0.4:
                    children.append(Child(f"s{n}", supervisor(depth - 1)))
                else:
                    leaves.append(Child(f"a{n}", partial(Flaky, chaos, rng), start_timeout_s=5))
                    children.append(leaves[-1])
            intensity = 1000 if depth == 2 else 2
            strategy = rng.choice([ONE_FOR_ONE, ONE_FOR_ALL, REST_FOR_ONE])
            return Supervisor(strategy, intensity=intensity, period_s=20, children=children, backoff=Backoff(cap_s=1))

        async with open_system(supervisor(2), rng=rng) as system:
            chaos[0] = 0.3
            for _ in range(40):
                await trio.sleep(rng.random())
                leaf = rng.choice(leaves)
                if leaf.ref.inspect()["state"] != "new":
                    kill(system, rng.choice([leaf.ref.name, leaf.ref.name.split("/")[0]]))
            chaos[0] = 0.0
            await trio.sleep(120)
            assert system.all_running(), system.format_tree()
            for n, leaf in enumerate(leaves):
                assert await leaf.ref.ask(Work(n), timeout_s=1) == n
            return sum(leaf.ref.inspect()["restarts"] for leaf in leaves)

    assert sum(int(str(simulate(main, seed))) for seed in FEW) > 5 * len(FEW)


def test_starts_and_stops_that_cross_leave_nothing_behind(simulate: Simulate) -> None:
    async def main(rng: Random) -> None:
        open_now: list[str] = []

        class Holder(Actor):
            async def on_start(self) -> None:
                name = self.ctx.name
                await trio.sleep(rng.random())
                assert name not in open_now, "two incarnations at once"
                open_now.append(name)
                self.ctx.stack.push_async_callback(self.release, name)
                await trio.sleep(rng.random())
                if rng.random() < 0.2:
                    raise OSError("no start")

            async def release(self, name: str) -> None:
                await trio.sleep(rng.random())
                open_now.remove(name)

        async def client() -> None:
            for _ in range(8):
                name = str(rng.randrange(4))
                with trio.move_on_after(rng.random() * 3):
                    try:
                        if rng.random() < 0.6:
                            await pool.start_child(Child(name, Holder, start_timeout_s=0.2 + rng.random() * 2))
                        else:
                            await pool.stop_child(name)
                    except (OSError, StartTimeout, NameTaken, NoSuchChild, ActorDown):
                        await trio.sleep(rng.random())

        async def killer() -> None:
            for _ in range(10):
                await trio.sleep(rng.random())
                for name in pool.names:
                    if rng.random() < 0.3:
                        kill(system, name)

        pool = DynamicSupervisor(intensity=2, period_s=10)
        with trio.move_on_after(rng.random() * 30):
            async with open_system(pool, rng=rng) as system:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(killer)
                    for _ in range(4):
                        nursery.start_soon(client)
                await trio.sleep(5)
                running = [name for name in pool.names if system[name].inspect()["state"] == "running"]
                assert sorted(open_now) == sorted(running)
        assert open_now == []
        assert pool.names == []

    for seed in FEW:
        simulate(main, seed)
