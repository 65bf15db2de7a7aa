"""The tasks of an incarnation end with it, and their failure is its failure."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from trio.testing import MockClock

from actors import ActorDown, Child, Supervisor, handles, open_system

from .kit import Crash, Crashing


class Parent(Crashing):
    def __init__(self, log: list[tuple[float, str]], lasts_s: float = 0) -> None:
        self.log = log
        self.lasts_s = lasts_s

    def note(self, text: str) -> None:
        self.log.append((trio.current_time(), text))

    async def on_start(self) -> None:
        self.note("start")
        self.ctx.stack.callback(self.note, "stack closes")
        self.task = self.ctx.spawn(self.work)

    async def work(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self.lasts_s):
                await trio.sleep_forever()
            self.note("task ends")

    async def on_stop(self) -> None:
        self.note("on_stop")
        await trio.sleep(1)
        assert not self.task.done


async def test_outer_cancellation_does_not_reach_tasks_before_their_turn(autojump_clock: MockClock) -> None:
    log: list[tuple[float, str]] = []
    with trio.move_on_after(5):
        async with open_system(Supervisor(children=[Child("a", partial(Parent, log))])):
            await trio.sleep_forever()
    assert log == [(0, "start"), (5, "on_stop"), (6, "task ends"), (6, "stack closes")]


async def test_no_incarnation_begins_before_the_tasks_of_the_former_have_ended(autojump_clock: MockClock) -> None:
    log: list[tuple[float, str]] = []
    child = Child("a", partial(Parent, log, 20), shutdown_s=3)
    async with open_system(Supervisor(children=[child])):
        child.ref.tell(Crash())
        await trio.sleep(30)
        assert log == [(0, "start"), (3, "stack closes"), (20, "task ends"), (20, "start")]
    assert log[-3:] == [(30, "on_stop"), (33, "stack closes"), (51, "task ends")]


async def test_a_task_that_fails_crashes_its_actor_even_in_a_handler(autojump_clock: MockClock) -> None:
    class Failing(Parent):
        async def work(self) -> None:
            await trio.sleep(2)
            raise OSError("in a task")

        @handles(Crash)
        async def crash(self, message: Crash) -> None:
            await trio.sleep(100)

    log: list[tuple[float, str]] = []
    child = Child("a", partial(Failing, log))
    async with open_system(Supervisor(children=[child])):
        child.ref.tell(Crash())
        await trio.sleep(3)
        assert child.ref.inspect()["exits"] == [{"at_s": 2.0, "reason": "crashed: OSError: in a task"}]
        assert log == [(0, "start"), (2, "stack closes"), (2, "start")]


async def test_a_task_that_fails_while_its_actor_starts_fails_the_start(autojump_clock: MockClock) -> None:
    class Failing(Parent):
        async def on_start(self) -> None:
            await super().on_start()
            await trio.sleep(100)

        async def work(self) -> None:
            raise OSError("in a task")

    log: list[tuple[float, str]] = []
    with pytest.raises(OSError, match="in a task"):
        async with open_system(Supervisor(children=[Child("a", partial(Failing, log))])):
            pytest.fail("it did not start")
    assert log == [(0, "start"), (0, "stack closes")]


async def test_a_task_that_fails_while_its_actor_is_stopped_is_no_crash(autojump_clock: MockClock) -> None:
    class Sour(Parent):
        async def work(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("in a task")

    log: list[tuple[float, str]] = []
    child = Child("a", partial(Sour, log))
    async with open_system(Supervisor(intensity=0, children=[child])):
        pass
    assert [entry["reason"] for entry in child.ref.inspect()["exits"]] == ["stopped: OSError: in a task"]
    assert [text for _, text in log] == ["start", "on_stop", "stack closes"]


async def test_a_keyboard_interrupt_in_a_task_stops_the_system_in_order(autojump_clock: MockClock) -> None:
    class Interrupted(Parent):
        async def work(self) -> None:
            await trio.sleep(1)
            raise KeyboardInterrupt

    log: list[tuple[float, str]] = []
    other: list[tuple[float, str]] = []
    children = [Child("a", partial(Parent, other)), Child("b", partial(Interrupted, log))]

    async def run() -> None:
        async with open_system(Supervisor(children=children)):
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await run()
    assert [text for _, text in log] == ["start", "stack closes"]
    assert [text for _, text in other] == ["start", "on_stop", "task ends", "stack closes"]


async def test_a_task_may_be_cancelled_and_waited_for(autojump_clock: MockClock) -> None:
    log: list[tuple[float, str]] = []
    child = Child("a", partial(Parent, log, 4))
    async with open_system(Supervisor(children=[child])):
        actor = child._cell.actor
        assert isinstance(actor, Parent)
        actor.task.cancel()
        await actor.task.wait()
        assert actor.task.done
        assert log == [(0, "start"), (4, "task ends")]
        assert child.ref.inspect()["tasks"] == []
        spawn = actor.ctx.spawn
        actor.task = spawn(trio.sleep_forever)
    with pytest.raises(ActorDown):
        spawn(trio.sleep_forever)
    assert child.ref.inspect()["restarts"] == 0
