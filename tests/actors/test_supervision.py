"""Which children restart, when and how often, and to whom a failure belongs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import (
    ONE_FOR_ALL,
    ONE_FOR_ONE,
    PERMANENT,
    REST_FOR_ONE,
    TEMPORARY,
    TRANSIENT,
    Actor,
    ActorDown,
    Backoff,
    Child,
    DynamicSupervisor,
    Fenced,
    GaveUp,
    NameTaken,
    NoSuchChild,
    Restart,
    Started,
    StartFailed,
    StartTimeout,
    Strategy,
    Supervisor,
    TooManyRestarts,
    check_fence,
    handles,
    open_system,
)
from actors.testing import kill

from .kit import Crash, Crashing, Finish

AT_ONCE = Backoff(base_s=0)


class Worker(Crashing):
    """Writes down what happens to it; fails to start as often as it is told to."""

    def __init__(self, name: str, log: list[str], failing_starts: list[Exception] | None = None) -> None:
        self.name = name
        self.log = log
        self.failing_starts = failing_starts or []

    async def on_start(self) -> None:
        self.ctx.stack.callback(self.log.append, f"-{self.name}")
        self.log.append(f"+{self.name}")
        await trio.lowlevel.checkpoint()
        if self.failing_starts:
            raise self.failing_starts.pop(0)


def worker(name: str, log: list[str], restart: Restart = PERMANENT) -> Child[Worker]:
    return Child(name, partial(Worker, name, log), restart)


async def settle() -> None:
    await trio.sleep(0.001)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (ONE_FOR_ONE, ["-b", "+b"]),
        (REST_FOR_ONE, ["-b", "-c", "+b", "+c"]),
        (ONE_FOR_ALL, ["-b", "-c", "-a", "+a", "+b", "+c"]),
    ],
)
async def test_a_strategy_restarts_its_children_in_order(
    autojump_clock: MockClock, strategy: Strategy, expected: list[str]
) -> None:
    log: list[str] = []
    children = [worker(name, log) for name in "abc"]
    async with open_system(Supervisor(strategy, children=children)) as system:
        assert log == ["+a", "+b", "+c"]
        log.clear()
        children[1].ref.tell(Crash())
        await settle()
        assert log == expected
        assert system.all_running()
        log.clear()
    assert log == ["-c", "-b", "-a"]


@pytest.mark.parametrize("strategy", [ONE_FOR_ALL, REST_FOR_ONE])
async def test_a_failed_group_restart_is_retried(autojump_clock: MockClock, strategy: Strategy) -> None:
    log: list[str] = []
    failing: list[Exception] = []
    b = Child("b", partial(Worker, "b", log, failing))
    children = [worker("a", log), b, worker("c", log)]
    async with open_system(Supervisor(strategy, intensity=3, children=children)) as system:
        failing += [OSError("1"), OSError("2")]
        children[0].ref.tell(Crash())
        await trio.sleep(10)
        assert system.all_running()
        assert [child.ref.inspect()["state"] for child in children] == ["running"] * 3
        assert log[-1] == "+c"


async def test_a_temporary_child_stays_away_after_a_group_restart(autojump_clock: MockClock) -> None:
    log: list[str] = []
    children = [worker("a", log), worker("b", log, TEMPORARY), worker("c", log)]
    async with open_system(Supervisor(ONE_FOR_ALL, children=children)):
        children[0].ref.tell(Crash())
        await settle()
        assert log == ["+a", "+b", "+c", "-a", "-c", "-b", "+a", "+c"]


@pytest.mark.parametrize(
    ("restart", "message", "again"),
    [
        (PERMANENT, Crash(), True),
        (PERMANENT, Finish(), True),
        (TRANSIENT, Crash(), True),
        (TRANSIENT, Finish(), False),
        (TEMPORARY, Crash(), False),
        (TEMPORARY, Finish(), False),
    ],
)
async def test_a_child_is_restarted_as_its_kind_says(
    autojump_clock: MockClock, restart: Restart, message: object, again: bool
) -> None:
    log: list[str] = []
    child = worker("a", log, restart)
    async with open_system(Supervisor(children=[child])):
        child.ref.tell(message)
        await settle()
        assert log == (["+a", "-a", "+a"] if again else ["+a", "-a"])


async def test_a_failure_before_started_belongs_to_the_starter(autojump_clock: MockClock) -> None:
    log: list[str] = []
    vms = DynamicSupervisor()
    async with open_system(vms) as system:
        with pytest.raises(OSError, match="no disk"):
            await vms.start_child(Child("a", partial(Worker, "a", log, [OSError("no disk")])))
        assert log == ["+a", "-a"]
        assert vms.names == []
        assert system.tree()["given_up_total"] == 0
        await vms.start_child(Child("a", partial(Worker, "a", log)))
        assert vms.names == ["a"]


async def test_a_failure_after_started_belongs_to_the_supervisor(autojump_clock: MockClock) -> None:
    async def child(*, task_status: Started) -> None:
        runs.append(trio.current_time())
        task_status.started()
        if len(runs) == 1:
            raise OSError("later")
        await trio.sleep_forever()

    runs: list[float] = []
    vms = DynamicSupervisor()
    async with open_system(vms):
        await vms.start_child(Child("a", child))
        await settle()
        assert len(runs) == 2


async def test_a_tree_that_cannot_start_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    log: list[str] = []
    broken = Child("c", partial(Worker, "c", log, [OSError("no disk")]))
    inner = Supervisor(children=[worker("b", log), broken])
    with pytest.raises(OSError, match="no disk"):
        async with open_system(Supervisor(children=[worker("a", log), Child("inner", inner)])):
            pytest.fail("it did not start")
    assert log == ["+a", "+b", "+c", "-c", "-b", "-a"]


class Hanging(Actor):
    """Does not start, and takes two seconds to clean up."""

    def __init__(self, cleaned: list[float]) -> None:
        self._cleaned = cleaned

    async def on_start(self) -> None:
        self.ctx.stack.push_async_callback(self.clean_up)
        await trio.sleep_forever()

    async def clean_up(self) -> None:
        await trio.sleep(2)
        self._cleaned.append(trio.current_time())


async def test_a_start_has_a_deadline(autojump_clock: MockClock) -> None:
    async def hanging(*, task_status: Started) -> None:
        await trio.sleep_forever()

    cleaned: list[float] = []
    vms = DynamicSupervisor()
    async with open_system(vms):
        with pytest.raises(StartTimeout, match="a has not started within 3 s"):
            await vms.start_child(Child("a", partial(Hanging, cleaned), start_timeout_s=3))
        assert cleaned == [5]
        with pytest.raises(StartTimeout):
            await vms.start_child(Child("b", hanging, start_timeout_s=3))
        assert vms.names == []


async def test_a_start_whose_caller_leaves_is_undone(autojump_clock: MockClock) -> None:
    cleaned: list[float] = []
    vms = DynamicSupervisor()
    async with open_system(vms):
        with trio.move_on_after(1):
            await vms.start_child(Child("a", partial(Hanging, cleaned)))
        assert cleaned == [3]
        assert vms.names == []


async def test_a_function_that_ends_without_started_fails_the_start(autojump_clock: MockClock) -> None:
    async def silent(*, task_status: Started) -> None:
        pass

    vms = DynamicSupervisor()
    async with open_system(vms):
        with pytest.raises(StartFailed, match="without calling started"):
            await vms.start_child(Child("a", silent))


async def test_intensity_counts_exactly_and_escalates(autojump_clock: MockClock) -> None:
    log: list[str] = []
    child = worker("a", log)
    root = Supervisor(intensity=2, period_s=10, children=[child], backoff=AT_ONCE)

    async def crash_often() -> None:
        async with open_system(root):
            for at_s in (0, 5, 10.5, 15.5):  # never three within ten seconds
                await trio.sleep_until(at_s)
                child.ref.tell(Crash())
            await trio.sleep_until(20.5)  # with 10.5 and 15.5 the third: the period includes both its ends
            child.ref.tell(Crash())
            await trio.sleep_forever()

    with pytest.raises(TooManyRestarts) as caught:
        await crash_often()
    assert isinstance(caught.value.reason.exception, ValueError)
    assert trio.current_time() == pytest.approx(20.5)
    assert log == ["+a", "-a"] * 5


async def test_an_inner_supervisor_that_gives_up_is_restarted_by_the_outer(autojump_clock: MockClock) -> None:
    log: list[str] = []
    child = worker("b", log)
    inner = Supervisor(intensity=0, children=[worker("a", log), child])
    outer = Supervisor(intensity=1, children=[Child("inner", inner)])

    async def crash_twice() -> None:
        async with open_system(outer) as system:
            child.ref.tell(Crash())
            await settle()
            assert log == ["+a", "+b", "-b", "-a", "+a", "+b"]
            assert system["inner/b"] is child.ref
            assert system.all_running()
            child.ref.tell(Crash())
            await trio.sleep_forever()

    with pytest.raises(TooManyRestarts, match="inner"):
        await crash_twice()


async def test_restarts_back_off_with_a_cap_and_a_seeded_jitter() -> None:
    backoff = Backoff(base_s=1, factor=2, cap_s=5)
    delays = [backoff.delay_s(n, Random(4)) for n in range(1, 8)]
    assert delays == [backoff.delay_s(n, Random(4)) for n in range(1, 8)]
    assert delays[0] == 0
    for delay, limit in zip(delays[1:], [1, 2, 4, 5, 5, 5], strict=True):
        assert limit / 2 < delay <= limit
    assert backoff.delay_s(10_000, Random(4)) <= 5


async def test_a_stop_interrupts_the_wait_for_a_restart(autojump_clock: MockClock) -> None:
    log: list[str] = []
    vms = DynamicSupervisor(intensity=100, backoff=Backoff(base_s=1000, cap_s=1000))
    async with open_system(vms):
        ref = await vms.start_child(worker("a", log))
        for _ in range(2):
            ref.tell(Crash())
            await settle()
        assert ref.inspect()["state"] == "restarting"
        with pytest.raises(ActorDown):
            ref.tell(Crash())
        await vms.stop_child("a")
        assert trio.current_time() < 1
        assert log == ["+a", "-a", "+a", "-a"]


async def test_giving_up_one_child_calls_gave_up_and_touches_no_other(autojump_clock: MockClock) -> None:
    told: list[GaveUp] = []
    names_then: list[list[str]] = []
    log: list[str] = []

    async def gave_up(message: GaveUp) -> None:
        await trio.sleep(1)
        names_then.append(vms.names)
        told.append(message)

    vms = DynamicSupervisor(intensity=2, period_s=60, gave_up=gave_up, backoff=AT_ONCE)
    async with open_system(vms) as system:
        bad, good = await vms.start_child(worker("bad", log)), await vms.start_child(worker("good", log))
        for _ in range(3):
            bad.tell(Crash())
            await settle()
        with pytest.raises(NameTaken):
            await vms.start_child(worker("bad", log))
        await trio.sleep(2)
        assert [message.name for message in told] == ["bad"]
        assert names_then == [["bad", "good"]]
        assert vms.names == ["good"]
        assert good.inspect()["restarts"] == 0
        assert system.all_running()
        assert system.tree()["given_up"][0]["reason"] == "crashed: ValueError: crashed"
        with pytest.raises(ActorDown):
            bad.tell(Crash())
        await vms.start_child(worker("bad", log))


async def test_gave_up_may_be_the_tell_of_an_actor(autojump_clock: MockClock) -> None:
    class Listener(Actor):
        @handles(GaveUp)
        async def gave_up(self, message: GaveUp) -> None:
            told.append(message.name)

    told: list[str] = []
    listener = Child("listener", Listener)
    vms = DynamicSupervisor(intensity=0, gave_up=listener.ref.tell)
    async with open_system(Supervisor(children=[listener, Child("vms", vms)])):
        ref = await vms.start_child(worker("a", []))
        ref.tell(Crash())
        await settle()
        assert told == ["a"]


async def test_giving_up_survives_a_callback_that_fails_or_hangs(autojump_clock: MockClock) -> None:
    def failing(message: GaveUp) -> None:
        raise OSError(message.name)

    async def hanging(message: GaveUp) -> None:
        await trio.sleep_forever()

    told: list[Callable[[GaveUp], Awaitable[None] | None]] = [failing, hanging]
    for gave_up in told:
        vms = DynamicSupervisor(intensity=0, gave_up=gave_up, gave_up_timeout_s=5)
        async with open_system(vms) as system:
            ref = await vms.start_child(worker("a", []))
            good = await vms.start_child(worker("good", []))
            ref.tell(Crash())
            await trio.sleep(6)
            assert vms.names == ["good"]
            assert good.inspect()["state"] == "running"
            assert system.all_running()


async def test_a_name_is_one_child_at_a_time(autojump_clock: MockClock) -> None:
    vms = DynamicSupervisor()
    async with open_system(vms):
        child = worker("a", [])
        await vms.start_child(child)
        with pytest.raises(NameTaken):
            await vms.start_child(worker("a", []))
        await vms.stop_child("a")
        with pytest.raises(NoSuchChild):
            await vms.stop_child("a")
        ref = await vms.start_child(child)
        assert ref is child.ref
    with pytest.raises(ActorDown):
        await vms.start_child(worker("b", []))
    with pytest.raises(NameTaken):
        Supervisor(children=[worker("a", []), worker("a", [])])


async def test_a_start_in_the_middle_is_undone_under_outer_cancellation(autojump_clock: MockClock) -> None:
    class Slow(Worker):
        async def on_start(self) -> None:
            await super().on_start()
            await trio.sleep(10)

    log: list[str] = []
    root = Supervisor(children=[worker("a", log), worker("b", log), Child("c", partial(Slow, "c", log))])
    with trio.move_on_after(5) as scope:
        async with open_system(root):
            pytest.fail("it did not start")
    assert scope.cancelled_caught
    assert trio.current_time() == 5
    assert log == ["+a", "+b", "+c", "-c", "-b", "-a"]


async def test_a_child_that_fails_while_it_is_stopped_is_no_crash(autojump_clock: MockClock) -> None:
    class Sour(Worker):
        async def on_stop(self) -> None:
            raise OSError("while stopping")

    async def sour(*, task_status: Started) -> None:
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("while stopping")

    log: list[str] = []
    told: list[GaveUp] = []
    vms = DynamicSupervisor(intensity=0, gave_up=told.append)
    async with open_system(Supervisor(intensity=0, children=[Child("vms", vms), Child("f", sour)])):
        await vms.start_child(Child("a", partial(Sour, "a", log)))
        await vms.start_child(Child("b", sour))
        await vms.stop_child("a")
        await vms.stop_child("b")
        await vms.start_child(Child("a", partial(Sour, "a", log)))
    assert told == []
    assert log == ["+a", "-a"] * 2


async def test_an_exception_of_the_block_comes_out_as_it_is(autojump_clock: MockClock) -> None:
    log: list[str] = []
    with pytest.raises(KeyError):
        async with open_system(Supervisor(children=[worker("a", log)])):
            raise KeyError
    with pytest.RaisesGroup(KeyError):
        async with open_system(Supervisor(children=[worker("a", log)])):
            raise ExceptionGroup("mine", [KeyError()])
    assert log == ["+a", "-a"] * 2


async def test_a_keyboard_interrupt_in_a_handler_stops_the_system_in_order(autojump_clock: MockClock) -> None:
    class Interrupted(Worker):
        @handles(Finish)
        async def interrupted(self, message: Finish) -> None:
            raise KeyboardInterrupt

    log: list[str] = []
    child = Child("b", partial(Interrupted, "b", log))

    async def interrupt() -> None:
        async with open_system(Supervisor(children=[worker("a", log), child, worker("c", log)])):
            child.ref.tell(Finish())
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await interrupt()
    assert log == ["+a", "+b", "+c", "-b", "-c", "-a"]


async def test_the_tree_shows_every_child_at_its_path(autojump_clock: MockClock) -> None:
    async def api(*, task_status: Started) -> None:
        task_status.started()
        await trio.sleep_forever()

    log: list[str] = []
    journal = worker("journal", log)
    vms = DynamicSupervisor()
    root = Supervisor(children=[journal, Child("vms", vms), Child("api", api)])
    async with open_system(root, name="volantd") as system:
        demo = await vms.start_child(worker("demo", log, TRANSIENT))
        assert system["vms/demo"] is demo
        assert system["vms"] is vms
        assert system["journal"] is journal.ref
        assert demo.name == "vms/demo"
        await trio.sleep(2)
        demo.tell(Crash())
        await settle()
        assert system.format_tree().splitlines() == [
            "volantd [supervisor] running",
            "├─ journal [actor] running",
            "├─ vms [dynamic supervisor] running",
            "│  └─ demo [actor] running 1 restarts (at 2.0 s crashed: ValueError: crashed)",
            "└─ api [task] running",
        ]
        tree = system.tree()
        assert [child["name"] for child in tree["children"]] == ["journal", "vms", "api"]
        node = tree["children"][1]["children"][0]
        assert (node["restarts"], node["exits"]) == (1, [{"at_s": 2.0, "reason": "crashed: ValueError: crashed"}])
        assert node["mailbox"] == {"depth": 0, "capacity": 64, "oldest_s": None}
        for path in ("nobody", "vms/nobody", "journal/x"):
            with pytest.raises(KeyError):
                system[path]


async def test_the_stack_may_hold_a_nursery_open_and_closes_after_the_tasks(autojump_clock: MockClock) -> None:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def resource(name: str) -> Any:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            log.append(f"+{name}")
            try:
                yield
            finally:
                await trio.sleep(1)  # shielded from the stop
                log.append(f"-{name}")
                nursery.cancel_scope.cancel()

    class Owner(Actor):
        async def on_start(self) -> None:
            for name in "ab":
                await self.ctx.stack.enter_async_context(resource(name))
            self.ctx.spawn(self.use)

        async def use(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                log.append("task ends")

        async def on_stop(self) -> None:
            log.append("on_stop")

        @handles(Crash)
        async def crash(self, message: Crash) -> None:
            raise ValueError("crashed")

        @handles(Finish)
        async def hang(self, message: Finish) -> None:
            await trio.sleep_forever()

    ends = ["task ends", "-b", "-a"]
    log: list[str] = []
    child = Child("a", Owner)
    with trio.move_on_after(10):
        async with open_system(Supervisor(children=[child])):
            child.ref.tell(Crash())
            await trio.sleep(5)
            child.ref.tell(Finish())
            await trio.sleep_forever()
    assert log == ["+a", "+b", *ends, "+a", "+b", "on_stop", *ends]
    assert trio.current_time() == 12


async def test_a_clean_up_that_hangs_ends_with_its_budget(autojump_clock: MockClock) -> None:
    class Stuck(Worker):
        async def on_start(self) -> None:
            await super().on_start()
            self.ctx.stack.push_async_callback(trio.sleep_forever)

        async def on_stop(self) -> None:
            await trio.sleep_forever()

    log: list[str] = []
    stuck = Child("b", partial(Stuck, "b", log), shutdown_s=4)
    async with open_system(Supervisor(children=[worker("a", log), stuck])):
        await settle()
        stopped_at_s = trio.current_time()
    assert trio.current_time() - stopped_at_s == pytest.approx(4)
    assert log == ["+a", "+b", "-b", "-a"]


async def test_a_killed_incarnation_has_no_effect_on_its_way_out(autojump_clock: MockClock) -> None:
    class Writer(Worker):
        async def on_start(self) -> None:
            await super().on_start()
            self.ctx.spawn(self.hold)

        async def hold(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                with pytest.raises(ActorDown):
                    self.ctx.spawn(trio.sleep_forever)
                with pytest.raises(ActorDown):
                    self.ctx.send_after(0, Finish())
                with pytest.raises(Fenced):
                    await pool.start_child(worker("late", self.log))
                with pytest.raises(Fenced):
                    check_fence()
                checked.append(self.name)
                notes.ref.tell(Finish())

        async def on_stop(self) -> None:
            self.log.append("goodbye")

    checked: list[str] = []
    received: list[float] = []

    class Notes(Actor):
        @handles(Finish)
        async def note(self, message: Finish) -> None:
            received.append(trio.current_time())

    log: list[str] = []
    notes = Child("notes", Notes)
    writer = Child("writer", partial(Writer, "w", log), TRANSIENT)
    pool = DynamicSupervisor()
    async with open_system(Supervisor(children=[notes, Child("pool", pool), writer])) as system:
        kill(system, "writer")
        await settle()
        assert received == []
        assert log == ["+w", "-w", "+w"]
        assert writer.ref.inspect()["exits"][0]["reason"] == "killed"
        kill(system, "")
        await trio.sleep(1000)
    assert received == []
    assert checked == ["w", "w"]
    assert log == ["+w", "-w", "+w", "-w"]


async def test_wrong_children_are_refused_at_once(autojump_clock: MockClock) -> None:
    with pytest.raises(TypeError):
        Child[None]("a", 3)  # type: ignore[call-overload]  # the mistake under test
    for name in ("", "/a", "a/"):
        with pytest.raises(ValueError, match="a child needs a name"):
            worker(name, [])
    with pytest.raises(TypeError, match="no actor"):
        getattr(Child("vms", DynamicSupervisor()), "ref")  # noqa: B009  # the type checker knows better
    vms = DynamicSupervisor()
    no_actor: Any = dict
    async with open_system(vms):
        with pytest.raises(TypeError, match="is no Actor"):
            await vms.start_child(Child("a", no_actor))
        await wait_all_tasks_blocked()
        assert vms.names == []


async def test_a_tree_may_take_as_long_to_start_as_its_children_may(autojump_clock: MockClock) -> None:
    class Slow(Worker):
        async def on_start(self) -> None:
            await super().on_start()
            await trio.sleep(25)

    children = [Child(name, partial(Slow, name, [])) for name in "abc"]
    inner = Child("inner", Supervisor(children=children))
    async with open_system(Supervisor(children=[inner]), name="top") as system:
        assert trio.current_time() == 75
        assert system.all_running()
    async with open_system(DynamicSupervisor(), name="top") as system:
        vms = system[""]
        await vms.start_child(worker("a", []))
        with pytest.raises(NameTaken, match="a child of top is already called a"):
            await vms.start_child(worker("a", []))


async def test_one_tree_cannot_run_twice_at_once(autojump_clock: MockClock) -> None:
    dynamic = DynamicSupervisor()
    async with open_system(dynamic):
        with pytest.raises(RuntimeError, match="runs already"):
            async with open_system(dynamic):
                pytest.fail("it runs already")
    static = Supervisor(children=[worker("a", [])])
    for _ in range(2):
        async with open_system(static) as system:
            assert system.all_running()
