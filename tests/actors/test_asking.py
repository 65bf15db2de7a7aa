"""An asker gets a reply, a reason or its deadline; never silence, and never the reply to another ask."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import (
    TRANSIENT,
    Actor,
    ActorDown,
    AskTimeout,
    Child,
    Deferred,
    Down,
    DynamicSupervisor,
    ExitKind,
    MailboxFull,
    Ref,
    Request,
    SelfAsk,
    Unhandled,
    handles,
    open_system,
)
from actors.testing import kill

from .kit import Note


class NotEnough(Exception):
    pass


@dataclass(frozen=True)
class Withdraw(Request[int]):
    amount: int
    raises = (NotEnough,)


@dataclass(frozen=True)
class Sleep(Request[str]):
    seconds: float


@dataclass(frozen=True)
class Defer(Request[str]):
    seconds: float
    failing: bool = False


@dataclass(frozen=True)
class Crash(Request[None]):
    pass


@dataclass(frozen=True)
class CrashInTask(Request[None]):
    pass


@dataclass(frozen=True)
class AskYourself(Request[int]):
    in_a_task: bool = False


@dataclass(frozen=True)
class Notes(Request[tuple[str, ...]]):
    pass


@dataclass(frozen=True)
class Watch(Request[None]):
    other: Any


@dataclass(frozen=True)
class Foreign(Request[int]):
    pass


class Account(Actor):
    mailbox = 4

    def __init__(self, balance: int = 10) -> None:
        self.balance = balance
        self.notes: list[str] = []

    @handles(Withdraw)
    async def withdraw(self, message: Withdraw) -> int:
        if message.amount > self.balance:
            raise NotEnough(message.amount)
        self.balance -= message.amount
        return self.balance

    @handles(Sleep)
    async def sleep(self, message: Sleep) -> str:
        await trio.sleep(message.seconds)
        self.notes.append(f"slept {message.seconds}")
        return f"slept {message.seconds}"

    @handles(Defer)
    async def defer(self, message: Defer) -> str | Deferred[str]:
        if message.seconds == 0:
            return "at once"
        deferred = self.ctx.defer(message)
        self.ctx.spawn(self.answer, deferred, message)
        return deferred

    async def answer(self, deferred: Deferred[str], message: Defer) -> None:
        await trio.sleep(message.seconds)
        if message.failing:
            deferred.fail(NotEnough(0))
        deferred.reply("later")

    @handles(Crash)
    async def crash(self, message: Crash) -> None:
        self.balance = 0
        raise ValueError("crashed")

    @handles(CrashInTask)
    async def crash_in_task(self, message: CrashInTask) -> None:
        self.ctx.spawn(self.fail)
        await trio.sleep_forever()

    async def fail(self) -> None:
        raise ValueError("in a task")

    @handles(AskYourself)
    async def ask_yourself(self, message: AskYourself) -> int | Deferred[int]:
        if not message.in_a_task:
            return await self.ctx.self_ref.ask(Withdraw(1), timeout_s=100)
        deferred = self.ctx.defer(message)

        async def ask() -> None:
            deferred.reply(await self.ctx.self_ref.ask(Withdraw(1), timeout_s=100))

        self.ctx.spawn(ask)
        return deferred

    @handles(Note)
    async def note(self, message: Note) -> None:
        self.notes.append(message.text)

    @handles(Notes)
    async def read(self, message: Notes) -> tuple[str, ...]:
        return tuple(self.notes)

    @handles(Watch)
    async def watch(self, message: Watch) -> None:
        self.ctx.monitor(message.other)

    @handles(Down)
    async def down(self, message: Down) -> None:
        self.notes.append(f"{message.ref.name} {message.reason}")


def bank() -> DynamicSupervisor:
    return DynamicSupervisor(intensity=1000, period_s=60)


async def test_a_request_is_answered_and_a_tell_is_handled(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        ref.tell(Note("one"))
        assert await ref.ask(Withdraw(3), timeout_s=1) == 7
        assert await ref.ask(Withdraw(3), timeout_s=math.inf) == 4
        assert await ref.ask(Notes(), timeout_s=1) == ("one",)


async def test_a_declared_exception_reaches_the_asker_and_the_actor_lives(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        with pytest.raises(NotEnough):
            await ref.ask(Withdraw(11), timeout_s=1)
        ref.tell(Withdraw(11))
        assert await ref.ask(Withdraw(1), timeout_s=1) == 9
        assert ref.inspect()["mailbox"]["refused"] == 2
        assert ref.inspect()["restarts"] == 0


async def test_a_self_ask_is_found_at_once(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        with pytest.raises(ActorDown) as caught:
            await ref.ask(AskYourself(), timeout_s=10)
        assert isinstance(caught.value.reason.exception, SelfAsk)
        assert trio.current_time() < 1


async def test_a_child_task_may_ask_its_own_actor(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        assert await ref.ask(AskYourself(in_a_task=True), timeout_s=10) == 9


@pytest.mark.parametrize("message", [Crash(), CrashInTask()])
async def test_a_crash_fails_every_ask_at_once(autojump_clock: MockClock, message: Request[None]) -> None:
    bank_ = bank()
    reasons: list[str] = []

    async def ask(request: Request[Any]) -> None:
        with pytest.raises(ActorDown) as caught:
            await ref.ask(request, timeout_s=100)
        reasons.append(str(caught.value.reason.exception))

    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, Defer(50))
            nursery.start_soon(partial(ref.ask, Sleep(1), timeout_s=10))
            await wait_all_tasks_blocked()
            ref.tell(message)
            for _ in range(20):  # more than the mailbox holds
                nursery.start_soon(ask, Sleep(10))
        assert len(reasons) == 21
        assert len(set(reasons)) == 1
        assert trio.current_time() < 2


async def test_a_stop_fails_every_ask_at_once(autojump_clock: MockClock) -> None:
    bank_ = bank()
    kinds: list[ExitKind] = []

    async def ask(request: Request[Any]) -> None:
        with pytest.raises(ActorDown) as caught:
            await ref.ask(request, timeout_s=100)
        kinds.append(caught.value.reason.kind)

    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, Sleep(50))
            nursery.start_soon(ask, Sleep(50))
            await wait_all_tasks_blocked()
            await bank_.stop_child("a")
        assert kinds == [ExitKind.STOPPED] * 2
        with pytest.raises(ActorDown):
            await ref.ask(Withdraw(1), timeout_s=1)
        with pytest.raises(ActorDown):
            ref.tell(Note("x"))


async def test_a_late_reply_is_dropped(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        for request in (Sleep(5), Defer(5)):
            with pytest.raises(AskTimeout) as caught:
                await ref.ask(request, timeout_s=1)
            assert caught.value.begun
            await trio.sleep(10)
        assert ref.inspect()["mailbox"]["late_replies"] == 2
        assert ref.inspect()["mailbox"]["replies_owed"] == 0
        assert await ref.ask(Withdraw(1), timeout_s=1) == 9


async def test_an_ask_that_nobody_has_begun_is_withdrawn_when_its_asker_leaves(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(ref.ask, Sleep(5), timeout_s=10))
            await wait_all_tasks_blocked()
            with pytest.raises(AskTimeout) as caught:
                await ref.ask(Withdraw(10), timeout_s=1)
            assert not caught.value.begun
            for _ in range(50):
                with trio.move_on_after(0.01):
                    await ref.ask(Withdraw(10), timeout_s=10)
            figures = ref.inspect()["mailbox"]
            assert figures["depth"] <= figures["capacity"]
            assert figures["askers_waiting_for_room"] == 0
        assert await ref.ask(Withdraw(1), timeout_s=1) == 9


async def fill(ref: Ref[Account], nursery: trio.Nursery) -> None:
    """Keeps an account busy for five seconds, and fills its mailbox."""
    nursery.start_soon(partial(ref.ask, Sleep(5), timeout_s=10))
    await wait_all_tasks_blocked()
    for n in range(4):
        ref.tell(Note(str(n)))


async def test_a_full_mailbox_refuses_tells_and_lets_askers_wait_for_room(autojump_clock: MockClock) -> None:
    bank_ = bank()
    answers: list[int] = []

    async def withdraw() -> None:
        answers.append(await ref.ask(Withdraw(1), timeout_s=30))

    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:
            await fill(ref, nursery)
            with pytest.raises(MailboxFull):
                ref.tell(Note("one too many"))
            for _ in range(8):
                nursery.start_soon(withdraw)
            await wait_all_tasks_blocked()
            assert ref.inspect()["mailbox"]["askers_waiting_for_room"] == 8
        assert sorted(answers) == [2, 3, 4, 5, 6, 7, 8, 9]
        assert ref.inspect()["mailbox"]["rejected"] == 1


async def test_the_wait_for_room_is_within_the_deadline(
    autojump_clock: MockClock,
) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:
            await fill(ref, nursery)
            with pytest.raises(AskTimeout, match="no handler had begun, and it is withdrawn") as caught:
                await ref.ask(Withdraw(10), timeout_s=2)
            assert trio.current_time() == 2
            assert not caught.value.begun
            assert ref.inspect()["mailbox"]["askers_waiting_for_room"] == 0
        assert await ref.ask(Withdraw(1), timeout_s=1) == 9


async def test_the_first_answer_counts_and_a_second_is_dropped(autojump_clock: MockClock) -> None:
    class Twice(Account):
        async def answer(self, deferred: Deferred[str], message: Defer) -> None:
            deferred.reply("first")
            deferred.reply("second")
            deferred.fail(NotEnough())

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Twice))
        assert await ref.ask(Defer(1), timeout_s=1) == "first"
        assert ref.inspect()["mailbox"]["late_replies"] == 0


async def test_a_deferred_reply_fails_when_its_actor_ends(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_) as system:
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(ActorDown, match="killed"):
                    await ref.ask(Defer(50), timeout_s=math.inf)

            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            kill(system, "a")
        assert trio.current_time() == 0


async def test_a_handler_that_refuses_after_it_deferred_owes_nothing(autojump_clock: MockClock) -> None:
    class Torn(Account):
        @handles(Withdraw)
        async def withdraw(self, message: Withdraw) -> int:
            self.ctx.defer(message)
            raise NotEnough

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Torn))
        with pytest.raises(NotEnough):
            await ref.ask(Withdraw(1), timeout_s=1)
        assert ref.inspect()["mailbox"]["replies_owed"] == 0


async def test_only_what_is_being_handled_can_be_deferred(autojump_clock: MockClock) -> None:
    class Confused(Account):
        async def on_start(self) -> None:
            with pytest.raises(RuntimeError, match="being handled"):
                self.ctx.defer(Withdraw(1))

        @handles(Withdraw)
        async def withdraw(self, message: Withdraw) -> int:
            with pytest.raises(RuntimeError, match="being handled"):
                self.ctx.defer(Withdraw(message.amount))
            return 0

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Confused))
        assert await ref.ask(Withdraw(1), timeout_s=1) == 0


async def test_a_handler_replies_later_or_fails_later_while_others_are_served(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        answers = []

        async def defer(request: Defer) -> None:
            try:
                answers.append(await ref.ask(request, timeout_s=10))
            except NotEnough:
                answers.append("failed")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(defer, Defer(2))
            nursery.start_soon(defer, Defer(3, failing=True))
            await wait_all_tasks_blocked()
            assert await ref.ask(Defer(0), timeout_s=1) == "at once"
            assert trio.current_time() == 0
        assert answers == ["later", "failed"]


async def test_an_unknown_message_is_an_error_at_the_sender(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        with pytest.raises(Unhandled, match="a has no handler for Foreign"):
            await ref.ask(Foreign(), timeout_s=1)
        with pytest.raises(Unhandled):
            ref.tell("text")
        assert ref.inspect()["restarts"] == 0


async def test_a_restart_fails_queued_asks_and_never_repeats_what_crashed(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        outcomes = []

        async def withdraw() -> None:
            with pytest.raises(ActorDown):
                await ref.ask(Withdraw(1), timeout_s=100)
            outcomes.append("down")

        async with trio.open_nursery() as nursery:
            ref.tell(Crash())
            ref.tell(Note("first"))
            ref.tell(Note("second"))
            nursery.start_soon(withdraw)
        await trio.sleep(1)
        assert outcomes == ["down"]
        assert await ref.ask(Notes(), timeout_s=1) == ()
        assert ref.inspect()["restarts"] == 1


async def test_a_burst_starves_nobody(autojump_clock: MockClock) -> None:
    class Busy(Account):
        mailbox = 10_000

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Busy))
        turns = 0
        for n in range(10_000):
            ref.tell(Note(str(n)))
        while ref.inspect()["mailbox"]["depth"]:
            await trio.lowlevel.checkpoint()
            turns += 1
        assert turns > 30


async def test_a_half_applied_handler_leaves_no_state_behind(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        with pytest.raises(ActorDown):
            await ref.ask(Crash(), timeout_s=1)
        await trio.sleep(1)
        assert await ref.ask(Withdraw(1), timeout_s=1) == 9


async def test_two_actors_that_ask_each_other_end_by_their_deadlines(autojump_clock: MockClock) -> None:
    @dataclass(frozen=True)
    class Relay(Request[int]):
        to: Any

    class Node(Actor):
        @handles(Relay)
        async def relay(self, message: Relay) -> int:
            if message.to is None:
                return 0
            await trio.sleep(1)
            try:
                await message.to.ask(Relay(None), timeout_s=2)
            except AskTimeout:
                return 1
            return 0

    bank_ = bank()
    async with open_system(bank_):
        a = await bank_.start_child(Child("a", Node))
        b = await bank_.start_child(Child("b", Node))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(a.ask, Relay(b), timeout_s=10))
            assert await b.ask(Relay(a), timeout_s=10) == 1
        assert trio.current_time() == pytest.approx(3)


def test_a_message_must_be_frozen() -> None:
    @dataclass
    class Mutable:
        text: str

    with pytest.raises(TypeError, match="make it frozen"):
        handles(Mutable)


def test_two_handlers_for_one_message_are_an_error_of_the_class() -> None:
    with pytest.raises(TypeError, match="handles Note in one and in two"):

        class Twice(Actor):
            @handles(Note)
            async def one(self, message: Note) -> None: ...

            @handles(Note)
            async def two(self, message: Note) -> None: ...


async def test_one_handler_takes_several_types_of_messages(autojump_clock: MockClock) -> None:
    class Both(Account):
        @handles(Withdraw, Foreign)
        async def withdraw(self, message: Withdraw | Foreign) -> int:
            return message.amount if isinstance(message, Withdraw) else 0

        @handles(Sleep, Defer)
        async def never(self, message: Sleep | Defer) -> str:
            return type(message).__name__

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Both))
        assert await ref.ask(Withdraw(3)) == 3
        assert await ref.ask(Foreign()) == 0
        assert await ref.ask(Defer(1)) == "Defer"
        assert set(ref.inspect()["handlers"]) == {"Withdraw", "Foreign", "Defer"}
    with pytest.raises(TypeError, match="takes classes of messages"):
        handles()


async def test_the_callers_scope_bounds_an_ask_without_a_timeout(autojump_clock: MockClock) -> None:
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ref.ask, Sleep(5))
            await wait_all_tasks_blocked()
            with pytest.raises(trio.TooSlowError), trio.fail_after(1):
                await ref.ask(Withdraw(10))
            with pytest.raises(trio.TooSlowError):  # the deadline of an ask is an error of the same kind
                await ref.ask(Withdraw(10), timeout_s=1)
        assert await ref.ask(Withdraw(1)) == 9  # both were withdrawn


def test_a_handler_is_async() -> None:
    with pytest.raises(TypeError, match="must be an async method"):

        @handles(Note)  # type: ignore[arg-type]  # the mistake under test
        def note(self: Actor, message: Note) -> None: ...


async def test_an_actor_ends_itself_after_the_message_that_it_handles(autojump_clock: MockClock) -> None:
    class Finisher(Account):
        @handles(Sleep)
        async def sleep(self, message: Sleep) -> str:
            self.ctx.stop()
            await trio.sleep(message.seconds)
            return "done"

        async def on_stop(self) -> None:
            await trio.sleep(1)
            ended.append(trio.current_time())

    ended: list[float] = []
    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Finisher, TRANSIENT))
        ref.tell(Note("lost"))
        assert await ref.ask(Sleep(2), timeout_s=5) == "done"
        await trio.sleep(2)
        assert ended == [3]
        assert bank_.names == []


async def test_a_handler_may_stop_its_own_actor_through_the_supervisor(autojump_clock: MockClock) -> None:
    class SelfStopping(Account):
        @handles(Sleep)
        async def sleep(self, message: Sleep) -> str:
            await bank_.stop_child("a")
            return "never"

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", SelfStopping))
        with pytest.raises(ActorDown, match="stopped"):
            await ref.ask(Sleep(2), timeout_s=5)
        await settled()
        assert bank_.names == []


async def test_deadlines_expire_in_time_whatever_their_order(autojump_clock: MockClock) -> None:
    bank_ = bank()
    expired: list[float] = []

    async def ask(timeout_s: float) -> None:
        with pytest.raises(AskTimeout):
            await ref.ask(Defer(1000), timeout_s=timeout_s)
        assert trio.current_time() == pytest.approx(timeout_s)
        expired.append(timeout_s)

    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Account))
        async with trio.open_nursery() as nursery:
            for n in range(3000):
                nursery.start_soon(ask, 1 + n * 7919 % 3000 / 100)
        assert len(expired) == 3000
        assert ref.inspect()["mailbox"]["replies_owed"] == 0


async def test_answered_asks_are_not_kept_until_their_deadline(autojump_clock: MockClock) -> None:
    class Answer:
        pass

    @dataclass(frozen=True)
    class Question(Request[Answer]):
        pass

    class Oracle(Actor):
        @handles(Question)
        async def answer(self, message: Question) -> Answer:
            return Answer()

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Oracle))
        alive = weakref.WeakSet[Any]()
        for _ in range(100):
            question = Question()
            answer = await ref.ask(question, timeout_s=1000)
            alive.update([question, answer])
        del question, answer
        await wait_all_tasks_blocked()
        assert len(alive) == 0


async def test_deadlines_wake_nobody_as_long_as_they_are_kept(autojump_clock: MockClock) -> None:
    class Steps(trio.abc.Instrument):
        def __init__(self) -> None:
            self.taken = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.taken += task.name.endswith(": deadlines")

    bank_ = bank()
    async with open_system(bank_):
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        for number in range(100):
            ref = await bank_.start_child(Child(str(number), Account))
            await ref.ask(Withdraw(1), timeout_s=60)
        trio.lowlevel.remove_instrument(steps)
        assert steps.taken <= 1


async def test_inspect_shows_an_actor_whose_own_inspect_fails(autojump_clock: MockClock) -> None:
    class Open(Account):
        def inspect(self) -> dict[str, object]:
            return {"balance": 10 // self.balance}

    bank_ = bank()
    async with open_system(bank_):
        ref = await bank_.start_child(Child("a", Open))
        assert ref.inspect()["actor"] == {"balance": 1}
        await ref.ask(Withdraw(10), timeout_s=1)
        assert ref.inspect()["actor"] == {"error": "ZeroDivisionError: integer division or modulo by zero"}
        assert ref.inspect()["recent"] == ["Withdraw"]


async def settled() -> None:
    await trio.sleep(0.001)
