"""Each monitor gets one `Down`, with the reason, ahead of the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import (
    TRANSIENT,
    Child,
    Down,
    DynamicSupervisor,
    Ref,
    Request,
    System,
    handles,
    open_system,
)
from actors.testing import kill

from .kit import Crash, Crashing, Finish, Note


@dataclass(frozen=True)
class Watch(Request[None]):
    ref: Any
    no_longer: bool = False


@dataclass(frozen=True)
class Sleep(Request[None]):
    seconds: float


class Watcher(Crashing):
    mailbox = 2

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    @handles(Watch)
    async def watch(self, message: Watch) -> None:
        if message.no_longer:
            self.ctx.demonitor(message.ref)
        else:
            self.ctx.monitor(message.ref)

    @handles(Sleep)
    async def sleep(self, message: Sleep) -> None:
        await trio.sleep(message.seconds)

    @handles(Note)
    async def note(self, message: Note) -> None:
        self.seen.append(message.text)

    @handles(Down)
    async def down(self, message: Down) -> None:
        self.seen.append(f"{message.ref.name} {message.reason}")


Ending = Callable[[DynamicSupervisor, System, Ref[Crashing]], Any]


async def _stop(pool: DynamicSupervisor, system: System, ref: Ref[Crashing]) -> None:
    await pool.stop_child("target")


async def _kill(pool: DynamicSupervisor, system: System, ref: Ref[Crashing]) -> None:
    kill(system, "target")


async def _crash(pool: DynamicSupervisor, system: System, ref: Ref[Crashing]) -> None:
    ref.tell(Crash())


async def _finish(pool: DynamicSupervisor, system: System, ref: Ref[Crashing]) -> None:
    ref.tell(Finish())


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (_stop, "target stopped"),
        (_kill, "target killed"),
        (_crash, "target crashed: ValueError: crashed"),
        (_finish, "target finished"),
    ],
)
async def test_a_monitor_delivers_one_down_with_the_reason(
    autojump_clock: MockClock, ending: Ending, reason: str
) -> None:
    seen: list[str] = []
    pool = DynamicSupervisor()
    async with open_system(pool) as system:
        target = await pool.start_child(Child("target", Crashing, TRANSIENT))
        watcher = await pool.start_child(Child("watcher", partial(Watcher, seen)))
        await watcher.ask(Watch(target), timeout_s=1)
        await ending(pool, system, target)
        await trio.sleep(5)
        assert seen == [reason]


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[Ref[Crashing], Ref[Watcher], list[str]]]:
    """Runs a target and a watcher of it; yields both, and what the watcher has seen."""
    seen: list[str] = []
    pool = DynamicSupervisor()
    async with open_system(pool):
        target = await pool.start_child(Child("target", Crashing))
        watcher = await pool.start_child(Child("watcher", partial(Watcher, seen)))
        await watcher.ask(Watch(target), timeout_s=1)
        yield target, watcher, seen


async def test_a_down_finds_room_in_a_full_mailbox_and_overtakes_it(autojump_clock: MockClock) -> None:
    async with watched() as (target, watcher, seen):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(watcher.ask, Sleep(2), timeout_s=5))
            await wait_all_tasks_blocked()
            for text in "ab":
                watcher.tell(Note(text))
            target.tell(Crash())
        await trio.sleep(1)
        assert seen == ["target crashed: ValueError: crashed", "a", "b"]


async def test_a_monitor_of_an_actor_that_does_not_run_delivers_at_once(autojump_clock: MockClock) -> None:
    seen: list[str] = []
    pool = DynamicSupervisor()
    async with open_system(pool):
        watcher = await pool.start_child(Child("watcher", partial(Watcher, seen)))
        unborn = Child("unborn", Crashing)
        await watcher.ask(Watch(unborn.ref), timeout_s=1)
        target = await pool.start_child(Child("target", Crashing))
        await pool.stop_child("target")
        await watcher.ask(Watch(target), timeout_s=1)
        await trio.sleep(1)
        assert seen == ["unborn not started", "target stopped"]


async def test_a_monitor_can_be_taken_back(autojump_clock: MockClock) -> None:
    async with watched() as (target, watcher, seen):
        await watcher.ask(Watch(target, no_longer=True), timeout_s=1)
        await watcher.ask(Watch(target, no_longer=True), timeout_s=1)
        target.tell(Crash())
        await trio.sleep(5)
        assert seen == []


async def test_monitors_die_with_the_incarnation_that_set_them(autojump_clock: MockClock) -> None:
    async with watched() as (target, watcher, seen):
        for _ in range(3):
            await watcher.ask(Watch(target), timeout_s=1)
            watcher.tell(Crash())
            await trio.sleep(30)
        target.tell(Crash())
        await trio.sleep(5)
        assert seen == []
        assert target._mailbox.watchers == {}


async def test_an_actor_without_a_handler_for_down_cannot_monitor(autojump_clock: MockClock) -> None:
    class Deaf(Crashing):
        async def on_start(self) -> None:
            with pytest.raises(TypeError, match="deaf monitors target, but has no handler for Down"):
                self.ctx.monitor(target)

    pool = DynamicSupervisor()
    async with open_system(pool):
        target = await pool.start_child(Child("target", Crashing))
        await pool.start_child(Child("deaf", Deaf))
