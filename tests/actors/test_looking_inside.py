"""What a running system shows: ages, times, counts, senders, and messages that were never handled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from actors import (
    TRANSIENT,
    ActorDown,
    AskTimeout,
    Child,
    Deferred,
    Down,
    DynamicSupervisor,
    Exit,
    ExitKind,
    Ref,
    Request,
    Started,
    Supervisor,
    System,
    TapEvent,
    handles,
    open_system,
)

from .kit import Crash, Crashing, Note


class Refused(Exception):
    pass


@dataclass(frozen=True)
class Work(Request[str]):
    seconds: float = 0
    raises = (Refused,)


@dataclass(frozen=True)
class Later(Request[str]):
    seconds: float


class Worker(Crashing):
    mailbox = 3

    @handles(Work)
    async def work(self, message: Work) -> str:
        if message.seconds < 0:
            raise Refused
        await trio.sleep(message.seconds)
        return "done"

    @handles(Later)
    async def later(self, message: Later) -> Deferred[str]:
        deferred = self.ctx.defer(message)

        async def answer() -> None:
            await trio.sleep(message.seconds)
            deferred.reply("late")

        self.ctx.spawn(answer)
        return deferred

    @handles(Note)
    async def note(self, message: Note) -> None: ...


async def test_the_age_of_the_oldest_message_says_how_far_an_actor_is_behind(autojump_clock: MockClock) -> None:
    child = Child("worker", Worker)
    async with open_system(Supervisor(children=[child])) as system:
        assert child.ref.inspect()["mailbox"]["oldest_s"] is None
        assert child.ref.inspect()["handling"] is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(child.ref.ask, Work(10), timeout_s=20))
            await trio.sleep(1)
            with trio.move_on_after(1):
                await child.ref.ask(Work(0), timeout_s=20)  # withdrawn: it does not count
            child.ref.tell(Note("queued at 2"))
            await trio.sleep(2)
            child.ref.tell(Note("queued at 4"))
            await trio.sleep(3)
            inside = child.ref.inspect()
            assert inside["mailbox"]["oldest_s"] == 5
            assert inside["handling"] == {"message": "Work", "for_s": 7}
            node = system.tree()["children"][0]
            assert node["mailbox"] == {"depth": 3, "capacity": 3, "oldest_s": 5}
            assert system.format_tree().splitlines()[1] == "└─ worker [actor] running mailbox 3/3 for 5.0 s"
        assert child.ref.inspect()["mailbox"]["oldest_s"] is None


async def test_handler_times_are_counted_by_message_over_all_incarnations(autojump_clock: MockClock) -> None:
    child = Child("worker", Worker)
    async with open_system(Supervisor(children=[child])):
        for seconds in (1, 3, 2):
            await child.ref.ask(Work(seconds), timeout_s=20)
        with pytest.raises(Refused):
            await child.ref.ask(Work(-1), timeout_s=20)
        child.ref.tell(Crash())
        await trio.sleep(1)
        await child.ref.ask(Work(4), timeout_s=20)
        assert child.ref.inspect()["handlers"] == {
            "Work": {"count": 5, "total_s": 10, "max_s": 4},
            "Crash": {"count": 1, "total_s": 0, "max_s": 0},
        }
        assert child.ref.inspect()["mailbox"]["handled"] == 6


async def test_a_trace_has_the_last_messages_of_one_actor(autojump_clock: MockClock) -> None:
    child = Child("worker", Worker)

    async def client(ref: Ref[Worker], *, task_status: Started) -> None:
        task_status.started()
        await ref.ask(Work(2), timeout_s=10)
        with pytest.raises(Refused):
            await ref.ask(Work(-1), timeout_s=10)
        await ref.ask(Later(1), timeout_s=10)
        await trio.sleep_forever()

    tree = Supervisor(children=[child, Child("client", partial(client, child.ref))])
    async with open_system(tree) as system:
        assert system.trace(child.ref) == []
        await trio.sleep(1)
        child.ref.tell(Note("secret"))
        await trio.sleep(5)
        child.ref.tell(Crash())
        await trio.sleep(1)
        child.ref.tell(Work(50))
        await wait_all_tasks_blocked()
        await trio.sleep(1)
        rows = system.trace(child.ref)
        keys = ["at_s", "message", "from", "waited_s", "took_s", "outcome"]
        assert [list(row) for row in rows] == [keys] * 5
        assert [tuple(row.values()) for row in rows] == [
            (0, "Work", "client", 0, 2, "handled"),
            (1, "Note", "", 1, 0, "handled"),
            (2, "Work", "client", 0, 0, "refused"),
            (2, "Later", "client", 0, 0, "deferred"),
            (6, "Crash", "", 0, 0, "crashed"),
        ]
        assert "secret" not in json.dumps(rows)
        assert system.trace(child.ref, last=1) == rows[-1:]
        assert child.ref.inspect()["recent"] == ["Work", "Note", "Work", "Later", "Crash"]
        for n in range(300):
            if child.ref.inspect()["handling"] is None:
                child.ref.tell(Note(str(n)))
    assert [row["outcome"] for row in system.trace(child.ref)][-1] == "interrupted"


async def test_a_trace_is_bounded(autojump_clock: MockClock) -> None:
    child = Child("worker", Worker)
    async with open_system(Supervisor(children=[child])) as system:
        for _ in range(250):
            await child.ref.ask(Work(), timeout_s=1)
        assert len(system.trace(child.ref)) == len(system.trace(child.ref, last=1000)) == 100
        assert len(system.trace(child.ref, last=7)) == 7
        assert system.trace(child.ref, last=0) == []


async def test_a_child_that_moves_to_another_system_brings_no_trace(autojump_clock: MockClock) -> None:
    child = Child("worker", Worker)
    for _ in range(2):
        async with open_system(Supervisor(children=[child])) as system:
            await child.ref.ask(Work(), timeout_s=1)
            assert [row["at_s"] for row in system.trace(child.ref)] == [0]
            await trio.sleep(10)


async def test_dead_letters_say_what_was_not_handled_and_why(autojump_clock: MockClock) -> None:
    vms = DynamicSupervisor()
    async with open_system(vms) as system:
        assert system.dead_letters() == {"total": 0, "by_reason": {}, "last": []}
        ref = await vms.start_child(Child("vm", Worker, TRANSIENT))
        with pytest.raises(AskTimeout):
            await ref.ask(Work(2), timeout_s=1)  # answered too late, at 2
        with pytest.raises(AskTimeout):
            await ref.ask(Later(2), timeout_s=1.5)
        await trio.sleep(3)
        ref.tell(Crash())
        ref.tell(Note("lost"))
        await trio.sleep(1)
        await vms.stop_child("vm")
        with pytest.raises(ActorDown):
            ref.tell(Note("nobody"))
        letters = system.dead_letters()
        assert (letters["total"], len(letters["last"])) == (4, 4)
        assert letters["by_reason"] == {"answered too late": 2, "lost at the end": 1, "told while down": 1}
        assert letters["last"][0] == {
            "at_s": 2.0,
            "to": "vm",
            "message": "Work",
            "from": "",
            "reason": "answered too late",
        }
        assert [letter["message"] for letter in letters["last"]] == ["Work", "Later", "Note", "Note"]
        for _ in range(1000):
            with pytest.raises(ActorDown):
                ref.tell(Note("nobody"))
        assert (system.dead_letters()["total"], len(system.dead_letters()["last"])) == (1004, 128)


async def test_restarts_have_their_reasons_and_only_the_last_are_kept(autojump_clock: MockClock) -> None:
    vms = DynamicSupervisor(intensity=100)
    async with open_system(vms):
        ref = await vms.start_child(Child("vm", Worker))
        for _ in range(12):
            ref.tell(Crash())
            await trio.sleep(20)
        inside = ref.inspect()
        assert (inside["restarts"], len(inside["exits"])) == (12, 8)
        assert inside["exits"][-1] == {"at_s": 220.0, "reason": "crashed: ValueError: crashed"}


async def test_everything_shown_is_ready_for_json(autojump_clock: MockClock) -> None:
    vms = DynamicSupervisor(intensity=0)
    async with open_system(Supervisor(children=[Child("vms", vms)])) as system:
        ref = await vms.start_child(Child("vm", Worker))
        good = await vms.start_child(Child("good", Worker))
        await ref.ask(Work(), timeout_s=1)
        ref.tell(Crash())
        await trio.sleep(1)
        for seen in (system.tree(), ref.inspect(), good.inspect(), system.trace(ref), system.dead_letters()):
            assert json.loads(json.dumps(seen)) == seen


async def test_a_tap_sees_everything_in_order(autojump_clock: MockClock) -> None:
    seen: list[tuple[float, str, str, str, Any]] = []

    def tap(event: TapEvent) -> None:
        seen.append((event.at_s, str(event.kind), event.name, event.sender, event.what))

    class Watcher(Worker):
        async def on_start(self) -> None:
            self.ctx.monitor(vm.ref)
            self.ctx.send_after(1, Note("timer"))

        @handles(Down)
        async def down(self, message: Down) -> None:
            await trio.sleep(0.1)  # until it is back
            vm.ref.tell(Note("again"))

    def incarnation(name: str) -> list[tuple[float, str, str, str, Any]]:
        return [(trio.current_time(), word, name, "", None) for word in ("starting", "started")]

    vm = Child("vm", Worker, TRANSIENT)
    watcher = Child("watcher", Watcher)
    async with open_system(Supervisor(children=[vm, watcher]), tap=tap):
        began = [
            (0, "starting", "", "", None),
            *incarnation("vm"),
            *incarnation("watcher"),
            (0, "started", "", "", None),
        ]
        assert seen == began
        seen.clear()
        await vm.ref.ask(Work(), timeout_s=1)
        assert seen == [
            (0, "ask", "vm", "", Work()),
            (0, "handle", "vm", "", Work()),
            (0, "reply", "vm", "", "done"),
        ]
        seen.clear()
        with pytest.raises(Refused):
            await vm.ref.ask(Work(-1), timeout_s=1)
        assert [entry[1] for entry in seen] == ["ask", "handle", "refuse"]
        await trio.sleep(2)
        assert [entry[:4] for entry in seen[3:]] == [
            (1, "timer", "watcher", "watcher"),
            (1, "handle", "watcher", "watcher"),
        ]
        seen.clear()
        vm.ref.tell(Crash())
        await trio.sleep(1)
        exit_ = seen[2][4]
        assert isinstance(exit_, Exit)
        assert exit_.kind is ExitKind.CRASHED
        assert [entry[1:3] for entry in seen] == [
            ("tell", "vm"),
            ("handle", "vm"),
            ("exit", "vm"),
            ("down", "watcher"),
            *[entry[1:3] for entry in seen[4:7]],  # of two tasks, in any order
            ("tell", "vm"),
            ("handle", "vm"),
        ]
        assert {entry[1:3] for entry in seen[4:7]} == {("starting", "vm"), ("started", "vm"), ("handle", "watcher")}
        assert seen[3][3] == "vm"
        assert seen[7][3:] == ("watcher", Note("again"))
        seen.clear()
    assert [entry[1:3] for entry in seen] == [("exit", "watcher"), ("exit", "vm"), ("exit", "")]


async def test_a_system_without_a_tap_takes_the_ambient_one(autojump_clock: MockClock) -> None:
    from actors._tap import ambient_tap

    seen: list[str] = []
    token = ambient_tap.set(lambda event: seen.append(event.kind))
    try:
        async with open_system(Supervisor(children=[Child("a", Worker)])):
            pass
    finally:
        ambient_tap.reset(token)
    assert seen == ["starting", "starting", "started", "started", "exit", "exit"]


async def test_a_path_leads_to_the_same_ref_over_restarts(autojump_clock: MockClock) -> None:
    vms = DynamicSupervisor()
    system: System
    async with open_system(Supervisor(children=[Child("vms", vms)])) as system:
        ref = await vms.start_child(Child("vm", Worker))
        ref.tell(Crash())
        await trio.sleep(1)
        assert system["vms/vm"] is ref
        assert ref.inspect()["restarts"] == 1
        assert await ref.ask(Work(), timeout_s=1) == "done"
