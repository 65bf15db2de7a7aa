"""Restarts happen at the exact second, and a failed start leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import pytest
import trio
from trio.lowlevel import current_statistics
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import (
    ONE_FOR_ALL,
    Actor,
    ActorDown,
    Backoff,
    Child,
    Down,
    DynamicSupervisor,
    GaveUp,
    Request,
    Started,
    Supervisor,
    handles,
    open_system,
)

from .kit import Crash, Crashing


@dataclass(frozen=True)
class Ping(Request[str]):
    pass


class Fragile(Crashing):
    def __init__(self, starts: list[float], failing: list[Exception] | None = None) -> None:
        self.starts = starts
        self.failing = failing if failing is not None else []

    async def on_start(self) -> None:
        self.starts.append(trio.current_time())
        if self.failing:
            raise self.failing.pop(0)

    @handles(Ping)
    async def ping(self, message: Ping) -> str:
        return "pong"


@pytest.mark.parametrize("kind", [DynamicSupervisor, partial(Supervisor, ONE_FOR_ALL)])
async def test_each_restart_waits_exactly_as_long_as_the_back_off_says(autojump_clock: MockClock, kind: Any) -> None:
    backoff = Backoff(base_s=1, factor=3, cap_s=5)
    starts: list[float] = []
    failing: list[Exception] = []
    child = Child("a", partial(Fragile, starts, failing))
    expected = Random(7)
    waits = [backoff.delay_s(n, expected) for n in range(1, 7)]
    assert waits[0] == 0
    settings: dict[str, Any] = {"intensity": 10, "period_s": 1000, "backoff": backoff}
    root = kind(**settings) if kind is DynamicSupervisor else kind(children=[child], **settings)
    async with open_system(root, rng=Random(7)):
        if isinstance(root, DynamicSupervisor):
            await root.start_child(child)
        failing += [OSError("no disk")] * 5
        await trio.sleep(10)
        child.ref.tell(Crash())
        await trio.sleep(100)
        assert await child.ref.ask(Ping(), timeout_s=1) == "pong"
    at_s = 10.0
    for began_s, wait_s in zip(starts[1:], waits, strict=True):
        at_s += wait_s
        assert began_s == pytest.approx(at_s)


async def test_a_dynamic_supervisor_counts_for_each_child_exactly(autojump_clock: MockClock) -> None:
    told: list[tuple[float, str]] = []

    def gave_up(message: GaveUp) -> None:
        told.append((trio.current_time(), message.name))

    pool = DynamicSupervisor(intensity=2, period_s=10, gave_up=gave_up, backoff=Backoff(base_s=0))
    async with open_system(pool):
        edge = await pool.start_child(Child("edge", partial(Fragile, [])))
        beyond = await pool.start_child(Child("beyond", partial(Fragile, [])))
        for at_s, ref in [(0, edge), (0, beyond), (5, edge), (5, beyond), (10, edge), (10.001, beyond)]:
            await trio.sleep_until(at_s)
            ref.tell(Crash())
        await trio.sleep(1)
        assert told == [(10, "edge")]  # three within ten seconds, both ends included
        assert pool.names == ["beyond"]
        assert await beyond.ask(Ping(), timeout_s=1) == "pong"


async def test_an_ask_during_a_back_off_fails_at_once(autojump_clock: MockClock) -> None:
    starts: list[float] = []
    pool = DynamicSupervisor(intensity=10, backoff=Backoff(base_s=100, cap_s=100))
    async with open_system(pool):
        ref = await pool.start_child(Child("a", partial(Fragile, starts)))
        for _ in range(2):
            ref.tell(Crash())
            await trio.sleep(1)
        began_s = trio.current_time()
        with pytest.raises(ActorDown, match="crashed: ValueError"):
            await ref.ask(Ping(), timeout_s=1000)
        assert trio.current_time() == began_s
        await trio.sleep(100)
        assert await ref.ask(Ping(), timeout_s=1) == "pong"


async def test_a_failed_start_leaves_nothing(autojump_clock: MockClock) -> None:
    class Holding(Fragile):
        async def on_start(self) -> None:
            alive.add(self)
            self.ctx.spawn(trio.sleep_forever)
            self.ctx.send_after(1000, Crash())
            self.ctx.monitor(other)
            await super().on_start()

        @handles(Down)
        async def down(self, message: Down) -> None: ...

    async def function(*, task_status: Started) -> None:
        raise OSError("no disk")

    alive = weakref.WeakSet[Actor]()
    pool = DynamicSupervisor()
    async with open_system(pool) as system:
        other = await pool.start_child(Child("other", partial(Fragile, [])))
        await wait_all_tasks_blocked()
        before = current_statistics().tasks_living
        for n in range(20):
            with pytest.raises(OSError, match="no disk"):
                await pool.start_child(Child("a", partial(Holding, [], [OSError("no disk")])))
            with pytest.raises(OSError, match="no disk"):
                await pool.start_child(Child(f"f{n}", function))
        await wait_all_tasks_blocked()
        gc.collect()
        assert current_statistics().tasks_living == before
        assert pool.names == ["other"]
        assert other._mailbox.watchers == {}
        assert len(alive) == 0
        assert system.tree()["given_up_total"] == 0


async def test_messages_wait_while_an_actor_starts_and_fail_when_it_cannot(autojump_clock: MockClock) -> None:
    class Slow(Fragile):
        async def on_start(self) -> None:
            await trio.sleep(2)
            await super().on_start()

    failing: list[Exception] = []
    slow = Child("slow", partial(Slow, [], failing))
    outcomes: list[tuple[float, str]] = []

    async def ask() -> None:
        try:
            answer = await slow.ref.ask(Ping(), timeout_s=100)
            outcomes.append((trio.current_time(), answer))
        except ActorDown as error:
            outcomes.append((trio.current_time(), str(error)))

    pool = DynamicSupervisor(intensity=10)
    async with open_system(pool):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.start_child, slow)
            await wait_all_tasks_blocked()
            nursery.start_soon(ask)
        assert outcomes == [(2, "pong")]
        outcomes.clear()
        failing.append(OSError("no disk"))
        slow.ref.tell(Crash())
        async with trio.open_nursery() as nursery:
            await trio.sleep(1)
            nursery.start_soon(ask)
        assert outcomes == [(4, "slow is down: crashed: OSError: no disk")]
