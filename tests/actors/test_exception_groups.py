"""Exception groups keep their shape between a handler and the reader of its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from actors import (
    TEMPORARY,
    Actor,
    ActorDown,
    Child,
    Down,
    Ref,
    Request,
    Started,
    Supervisor,
    TooManyRestarts,
    handles,
    open_system,
)


class Refused(Exception):
    pass


@dataclass(frozen=True)
class Fail(Request[None]):
    errors: tuple[type[Exception], ...]
    nested: bool = False
    raises = (Refused,)


async def fail(error: type[Exception]) -> None:
    raise error


async def fail_together(errors: tuple[type[Exception], ...], nested: bool) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        for error in errors:
            nursery.start_soon(fail, error)
        if nested:
            await fail_together(errors, nested=False)


class Failing(Actor):
    @handles(Fail)
    async def fail(self, message: Fail) -> None:
        await fail_together(message.errors, message.nested)


class Watcher(Actor):
    def __init__(self, other: Ref[Failing], seen: list[BaseException | None]) -> None:
        self.other = other
        self.seen = seen

    async def on_start(self) -> None:
        self.ctx.monitor(self.other)

    @handles(Down)
    async def down(self, message: Down) -> None:
        self.seen.append(message.reason.exception)


async def test_the_reason_of_a_crash_is_the_group_as_it_was_raised(autojump_clock: MockClock) -> None:
    seen: list[BaseException | None] = []
    failing = Child("failing", Failing, TEMPORARY)
    watcher = Child("watcher", lambda: Watcher(failing.ref, seen))
    async with open_system(Supervisor(children=[failing, watcher])):
        with pytest.raises(ActorDown) as caught:
            await failing.ref.ask(Fail((ValueError, OSError), nested=True))
        await trio.sleep(1)
    inner = pytest.RaisesGroup(ValueError, OSError)
    expected = pytest.RaisesGroup(ValueError, OSError, inner)
    assert expected.matches(caught.value.reason.exception)
    assert caught.value.__cause__ is caught.value.reason.exception
    assert seen == [caught.value.reason.exception]
    (entry,) = failing.ref.inspect()["exits"]
    assert sorted(re.findall(r"\w+", entry["reason"])) == sorted(
        ["crashed", *["ExceptionGroup", "ValueError", "OSError"] * 2]
    )


async def test_a_declared_exception_in_a_group_is_a_crash(autojump_clock: MockClock) -> None:
    failing = Child("failing", Failing, TEMPORARY)
    async with open_system(Supervisor(children=[failing])):
        with pytest.raises(ActorDown) as caught:
            await failing.ref.ask(Fail((Refused,)))
        assert pytest.RaisesGroup(Refused).matches(caught.value.reason.exception)


async def test_a_failed_start_raises_its_group_in_the_starter(autojump_clock: MockClock) -> None:
    async def task(*, task_status: Started) -> None:
        await fail_together((ValueError, OSError), nested=False)

    with pytest.RaisesGroup(ValueError, OSError):
        async with open_system(Supervisor(children=[Child("inner", Supervisor(children=[Child("task", task)]))])):
            pytest.fail("it did not start")


async def test_a_tree_that_gives_up_hides_no_exception_of_the_block(autojump_clock: MockClock) -> None:
    failing = Child("failing", Failing)

    async def run() -> None:
        async with open_system(Supervisor(intensity=0, children=[failing])):
            try:
                await failing.ref.ask(Fail((ValueError,)))
            except ActorDown:
                await trio.sleep(1)
            finally:
                raise KeyError

    with pytest.RaisesGroup(KeyError, TooManyRestarts):
        await run()
