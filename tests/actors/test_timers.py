"""A timer's message arrives on time, for the incarnation that set it alone, and waiting costs nothing."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass
from functools import partial

import pytest
import trio
from trio.lowlevel import current_statistics
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import (
    TRANSIENT,
    ActorDown,
    Child,
    DynamicSupervisor,
    Request,
    Supervisor,
    Timer,
    Unhandled,
    handles,
    open_system,
)

from .kit import Crash, Crashing


@dataclass(frozen=True)
class Tick:
    name: str


@dataclass(frozen=True)
class SetTimer(Request[Timer]):
    delay_s: float
    name: str


@dataclass(frozen=True)
class Rhythm(Request[None]):
    period_s: float


@dataclass(frozen=True)
class Work(Request[None]):
    seconds: float


class Clock(Crashing):
    mailbox = 2

    def __init__(self, ticks: list[tuple[float, str]]) -> None:
        self.ticks = ticks
        self.period_s = 0.0

    async def on_start(self) -> None:
        self.ctx.send_after(1, Tick("start"))

    @handles(SetTimer)
    async def set_timer(self, message: SetTimer) -> Timer:
        return self.ctx.send_after(message.delay_s, Tick(message.name))

    @handles(Rhythm)
    async def rhythm(self, message: Rhythm) -> None:
        self.period_s = message.period_s
        self.ctx.send_after(self.period_s, Tick("rhythm"))

    @handles(Tick)
    async def tick(self, message: Tick) -> None:
        self.ticks.append((trio.current_time(), message.name))
        if message.name == "rhythm":
            self.ctx.send_after(self.period_s, message)

    @handles(Work)
    async def work(self, message: Work) -> None:
        await trio.sleep(message.seconds)

    async def on_stop(self) -> None:
        with pytest.raises(ActorDown):
            self.ctx.send_after(1, Tick("too late"))


async def test_timers_are_due_in_order_exactly_when_they_say(autojump_clock: MockClock) -> None:
    ticks: list[tuple[float, str]] = []
    clock = Child("clock", partial(Clock, ticks))
    async with open_system(Supervisor(children=[clock])):
        for delay_s, name in ((3, "c"), (2, "a"), (2, "b"), (0, "now")):
            await clock.ref.ask(SetTimer(delay_s, name), timeout_s=1)
        await trio.sleep(10)
    assert ticks == [(0, "now"), (1, "start"), (2, "a"), (2, "b"), (3, "c")]


async def test_a_handler_that_sets_its_timer_again_keeps_a_rhythm(autojump_clock: MockClock) -> None:
    ticks: list[tuple[float, str]] = []
    clock = Child("clock", partial(Clock, ticks))
    async with open_system(Supervisor(children=[clock])):
        await clock.ref.ask(Rhythm(2), timeout_s=1)
        await trio.sleep(9)
        assert clock.ref.inspect()["timers"] == 1
    assert ticks == [(1, "start"), (2, "rhythm"), (4, "rhythm"), (6, "rhythm"), (8, "rhythm")]


async def test_timers_die_with_their_incarnation(autojump_clock: MockClock) -> None:
    ticks: list[tuple[float, str]] = []
    clock = Child("clock", partial(Clock, ticks), TRANSIENT)
    async with open_system(Supervisor(children=[clock])):
        timer = await clock.ref.ask(SetTimer(5, "of the first"), timeout_s=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(clock.ref.ask, Work(1), timeout_s=5))
            await wait_all_tasks_blocked()
            clock.ref.tell(Crash())  # "start" is due before it, and queued behind it
        await trio.sleep(20)
        assert not timer.pending
        assert ticks == [(2, "start")]
        assert clock.ref.inspect()["restarts"] == 1


async def test_a_cancelled_timer_is_not_handled_even_if_it_is_queued(autojump_clock: MockClock) -> None:
    ticks: list[tuple[float, str]] = []
    clock = Child("clock", partial(Clock, ticks))
    async with open_system(Supervisor(children=[clock])):
        waiting = await clock.ref.ask(SetTimer(5, "waiting"), timeout_s=1)
        queued = await clock.ref.ask(SetTimer(2, "queued"), timeout_s=1)
        done = await clock.ref.ask(SetTimer(0, "done"), timeout_s=1)
        await trio.sleep(1)
        assert [timer.pending for timer in (waiting, queued, done)] == [True, True, False]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(clock.ref.ask, Work(3), timeout_s=5))
            await trio.sleep(2)
            assert queued.pending
            for timer in (waiting, queued, done):
                timer.cancel()
                timer.cancel()
                assert not timer.pending
        await trio.sleep(10)
    assert ticks == [(0, "done"), (1, "start")]


async def test_a_timer_finds_room_in_a_full_mailbox(autojump_clock: MockClock) -> None:
    ticks: list[tuple[float, str]] = []
    clock = Child("clock", partial(Clock, ticks))
    async with open_system(Supervisor(children=[clock])):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(clock.ref.ask, Work(3), timeout_s=5))
            await wait_all_tasks_blocked()
            for name in "ab":
                clock.ref.tell(Tick(name))
            await trio.sleep(2)
            assert clock.ref.inspect()["mailbox"]["depth"] == 3
    assert ticks == [(3, "a"), (3, "b"), (3, "start")]


async def test_wrong_timers_are_refused_at_once(autojump_clock: MockClock) -> None:
    class Strange(Clock):
        @handles(Work)
        async def work(self, message: Work) -> None:
            with pytest.raises(Unhandled, match="strange has no handler for str"):
                self.ctx.send_after(1, "text")
            for delay_s in (-1, math.inf, math.nan):
                with pytest.raises(ValueError, match="delay_s must be"):
                    self.ctx.send_after(delay_s, Tick("x"))

    strange = Child("strange", partial(Strange, []))
    async with open_system(Supervisor(children=[strange])):
        await strange.ref.ask(Work(0), timeout_s=1)


async def test_timers_cost_no_task_and_those_cancelled_no_memory(autojump_clock: MockClock) -> None:
    pool = DynamicSupervisor()
    async with open_system(pool):
        ref = await pool.start_child(Child("clock", partial(Clock, [])))
        await trio.sleep(2)
        tasks = current_statistics().tasks_living
        messages = weakref.WeakSet[Tick]()
        woken = 0

        class Wakes(trio.abc.Instrument):
            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                nonlocal woken
                woken += task is not me

        timers = [await ref.ask(SetTimer(1000 + n, str(n)), timeout_s=1) for n in range(5000)]
        messages.update(timer.message for timer in timers if isinstance(timer.message, Tick))
        assert current_statistics().tasks_living == tasks
        assert len(messages) == 5000

        me = trio.lowlevel.current_task()
        wakes = Wakes()
        trio.lowlevel.add_instrument(wakes)
        await trio.sleep(900)
        trio.lowlevel.remove_instrument(wakes)
        assert woken <= 1  # the last deadline of an ask that was answered long ago
        for timer in timers[1:]:
            timer.cancel()
        gc.collect()
        assert len(messages) == 1
        assert ref.inspect()["timers"] == 1
