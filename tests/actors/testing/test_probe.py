"""A probe stands in for an actor: it keeps messages, answers as the test says, and can crash."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from actors import (
    Actor,
    ActorDown,
    AskTimeout,
    Child,
    Down,
    ExitKind,
    Ref,
    Request,
    Supervisor,
    Unhandled,
    handles,
    open_system,
)
from actors.testing import open_probe


@dataclass(frozen=True)
class Load(Request[str]):
    key: str


@dataclass(frozen=True)
class Saved:
    key: str


class Store(Actor):
    @handles(Load)
    async def load(self, message: Load) -> str:
        raise NotImplementedError

    @handles(Saved)
    async def saved(self, message: Saved) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Greet(Request[str]):
    pass


class Greeter(Actor):
    """What these tests test, by a probe in place of its store."""

    def __init__(self, store: Ref[Store]) -> None:
        self.store = store
        self.downs: list[Down] = []

    async def on_start(self) -> None:
        self.ctx.monitor(self.store)

    @handles(Greet)
    async def greet(self, message: Greet) -> str:
        name = await self.store.ask(Load("name"), timeout_s=5)
        self.store.tell(Saved("greeted"))
        return f"hello {name}"

    @handles(Down)
    async def down(self, message: Down) -> None:
        self.downs.append(message)

    def inspect(self) -> dict[str, object]:
        return {"downs": [down.reason.kind.value for down in self.downs]}


async def test_a_request_waits_until_the_test_replies(autojump_clock: MockClock) -> None:
    async with open_probe(Store) as store:
        greeter = Child("greeter", partial(Greeter, store.ref))
        async with open_system(Supervisor(children=[greeter])), trio.open_nursery() as nursery:
            answers: list[str] = []

            async def ask() -> None:
                answers.append(await greeter.ref.ask(Greet(), timeout_s=5))

            nursery.start_soon(ask)
            load = await store.expect(Load)
            assert load == Load("name")
            await store.expect_nothing(within_s=1)
            store.reply(load, "trio")
            assert await store.expect(Saved) == Saved("greeted")
            assert store.messages == [Load("name"), Saved("greeted")]
        assert answers == ["hello trio"]
        with pytest.raises(LookupError):
            store.reply(load, "twice")


async def test_a_script_answers_at_once(autojump_clock: MockClock) -> None:
    async with open_probe(Store) as store:
        store.answer(Load, "fixed")
        assert await store.ref.ask(Load("a"), timeout_s=1) == "fixed"
        store.answer(Load, lambda message: message.key.upper())
        assert await store.ref.ask(Load("a"), timeout_s=1) == "A"
        store.answer(Load, KeyError("a"))
        with pytest.raises(KeyError):
            await store.ref.ask(Load("a"), timeout_s=1)


async def test_a_probe_takes_the_messages_of_its_actor_alone(autojump_clock: MockClock) -> None:
    async with open_probe(Store) as store:
        assert store.ref.name == "Store"
        with pytest.raises(Unhandled):
            store.ref.tell("text")


async def test_a_missing_message_fails_with_what_came_instead(autojump_clock: MockClock) -> None:
    async with open_probe(Store, name="the store") as store:
        store.ref.tell(Saved("x"))
        with pytest.raises(AssertionError, match=r"the store got no Load within 10 s, but Saved\(key='x'\)"):
            await store.expect(Load)
        with pytest.raises(AssertionError, match=r"nothing, but got Saved"):
            await store.expect_nothing(within_s=1)


async def test_a_crash_of_a_probe_is_that_of_an_actor(autojump_clock: MockClock) -> None:
    async with open_probe(Store) as store:
        greeter = Child("greeter", partial(Greeter, store.ref))
        async with open_system(Supervisor(children=[greeter])):
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    with pytest.raises(ActorDown) as caught:
                        await store.ref.ask(Load("a"), timeout_s=5)
                    assert isinstance(caught.value.reason.exception, ZeroDivisionError)

                nursery.start_soon(ask)
                load = await store.expect(Load)
                await store.crash(ZeroDivisionError())
            with pytest.raises(LookupError):
                store.reply(load, "too late")
            store.answer(Load, "back again")
            assert await store.ref.ask(Load("a"), timeout_s=1) == "back again"
            await trio.testing.wait_all_tasks_blocked()
            assert greeter.ref.inspect()["actor"] == {"downs": [ExitKind.CRASHED.value]}
            await store.stop()
            with pytest.raises(ActorDown):
                store.ref.tell(Saved("x"))


async def test_a_request_can_be_refused_or_left_alone(autojump_clock: MockClock) -> None:
    async with open_probe(Store) as store, trio.open_nursery() as nursery:

        async def ask(error: type[Exception]) -> None:
            with pytest.raises(error):
                await store.ref.ask(Load("a"), timeout_s=5)

        nursery.start_soon(ask, PermissionError)
        store.refuse(await store.expect(Load), PermissionError())
        nursery.start_soon(ask, AskTimeout)
