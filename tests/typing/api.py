"""What a type checker must know of the runtime, and which mistakes it must find.

Nothing here runs. Both checkers must have no complaint, and a mistake that they no longer find is one: each ignored
error must be there (`warn_unused_ignores`, `reportUnnecessaryTypeIgnoreComment`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_type

from actors import (
    ONE_FOR_ONE,
    TRANSIENT,
    Actor,
    Child,
    Deferred,
    Down,
    DynamicSupervisor,
    Exit,
    Gap,
    GaveUp,
    Log,
    Ref,
    Request,
    Started,
    Supervisor,
    System,
    TapEvent,
    TaskHandle,
    Timer,
    fault,
    handles,
    open_system,
)


class Refused(Exception): ...


@dataclass(frozen=True)
class View:
    state: str


@dataclass(frozen=True)
class Stop(Request[View]):
    """Answered with a `View`."""

    raises = (Refused,)


@dataclass(frozen=True)
class Names(Request[list[str]]):
    prefix: str


@dataclass(frozen=True)
class Note:
    """Not answered."""

    text: str


class Vm(Actor):
    mailbox = 8

    def __init__(self, vm_id: str) -> None:
        self.vm_id = vm_id

    async def on_start(self) -> None:
        assert_type(self.ctx.spawn(self.pump, 3), TaskHandle)
        self.ctx.spawn(self.pump, "3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert_type(self.ctx.send_after(1.5, Note("later")), Timer)

    async def pump(self, count: int) -> None: ...

    @handles(Stop)
    async def stop(self, message: Stop) -> View:
        assert_type(self.ctx.defer(message), Deferred[View])
        return View("stopped")

    @handles(Names)
    async def names(self, message: Names) -> list[str] | Deferred[list[str]]:
        deferred = self.ctx.defer(message)
        deferred.reply(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        deferred.fail(Refused())
        return deferred

    @handles(Note)
    async def note(self, message: Note) -> None: ...

    @handles(Down)
    async def down(self, message: Down) -> None:
        assert_type(message.reason, Exit)

    def inspect(self) -> Mapping[str, object]:
        return {"vm_id": self.vm_id}


class ReturnsSomethingElse(Actor):
    @handles(Stop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def stop(self, message: Stop) -> str:
        return "stopped"


class ReturnsNothing(Actor):
    @handles(Stop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def stop(self, message: Stop) -> None: ...


class DefersSomethingElse(Actor):
    @handles(Stop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def stop(self, message: Stop) -> Deferred[int]:
        raise NotImplementedError


class TakesAnotherMessage(Actor):
    @handles(Note)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def note(self, message: Stop) -> None: ...


class AnswersWhatNobodyAsked(Actor):
    @handles(Note)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def note(self, message: Note) -> int:
        return 3


@dataclass(frozen=True)
class Start(Request[View]):
    """Answered with a `View`, as `Stop` is."""


@dataclass(frozen=True)
class Tick:
    """Not answered, as `Note`."""


class HandlesSeveral(Actor):
    @handles(Start, Stop)
    async def start_or_stop(self, message: Start | Stop) -> View:
        return View("")

    @handles(Note, Tick)
    async def note(self, message: Note | Tick) -> None: ...


class HandlesFewerThanItSays(Actor):
    @handles(Start, Stop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def start(self, message: Start) -> View:
        return View("")

    @handles(Note, Tick, View)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def note(self, message: Note | Tick) -> None: ...


class ReturnsSomethingElseForSeveral(Actor):
    @handles(Start, Stop)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def start_or_stop(self, message: Start | Stop) -> str:
        return ""


class IsNotAsync(Actor):
    @handles(Note)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    def note(self, message: Note) -> None: ...


async def ask(ref: Ref[Vm], system: System) -> None:
    assert_type(await ref.ask(Stop(), timeout_s=1), View)
    assert_type(await ref.ask(Names("v"), timeout_s=1), list[str])
    ref.tell(Note("hello"))
    text: str = await ref.ask(Stop(), timeout_s=1)  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    await ref.ask(Note(text), timeout_s=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await ref.ask(Stop()), View)
    any_actor: Ref[Actor] = ref
    assert_type(any_actor.name, str)
    assert_type(system.trace(ref, last=10), list[dict[str, Any]])


async def api(port: int, *, task_status: Started) -> None:
    task_status.started()


async def says_nothing(port: int) -> None: ...


async def tree(vms: DynamicSupervisor) -> None:
    child = Child("vm", partial(Vm, "vm"), TRANSIENT)
    assert_type(child, Child[Vm])
    assert_type(child.ref, Ref[Vm])
    assert_type(await vms.start_child(child), Ref[Vm])
    task = Child("api", partial(api, 1), shutdown_s=3)
    assert_type(task, Child[None])
    assert_type(await vms.start_child(task), None)
    Child("wrong", dict)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportCallIssue]
    Child("wrong", partial(Vm, 3))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    root = Supervisor(ONE_FOR_ONE, children=[child, task, Child("vms", vms)])

    def tap(event: TapEvent) -> None:
        assert_type(event.at_s, float)

    def gave_up(message: GaveUp) -> None:
        assert_type(message.reason, Exit)

    DynamicSupervisor(gave_up=gave_up)
    async with open_system(root, tap=tap) as system:
        assert_type(system, System)
    assert_type(fault("journal.commit"), bool)


async def read(log: Log) -> None:
    async with log.cursor(after=0) as cursor:
        taken = await cursor.take(100)
        taken.sort()  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        if not isinstance(taken, Gap):
            assert_type(taken, list[tuple[int, bytes]])
