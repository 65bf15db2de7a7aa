"""The actors of VMs by the VM's id. An actor starts when it is needed, and again after its supervisor gave it up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec
import trio

from actors import TRANSIENT, Child, DynamicSupervisor, GaveUp, NameTaken, NoSuchChild, Ref
from volant.journal import CommitSteps, Journal, Projection, StaleRow, ask_journal
from volant.model import DEFAULT_PROJECT, Key, Problem, Reason, Step, VmRow

from ._actor import VmActor
from ._layout import VmSettings

_START_S = 60.0
_SHUTDOWN_S = 10.0
_RETRY_S = 1.0
_NOTE_S = 5.0
"""How long a request waits for the row to say why its actor does not start."""
_STARTS_AT_ONCE = 8
_logger = logging.getLogger("volant.vm")


class VmActors(msgspec.Struct):
    """The actors of one daemon's VMs."""

    supervisor: DynamicSupervisor
    journal: Ref[Journal]
    projection: Projection
    make: Callable[[int], VmActor]
    """Returns the actor of the VM with an id."""
    settings: VmSettings
    _refs: dict[int, Ref[VmActor]] = msgspec.field(default_factory=dict)
    _starting: dict[int, trio.Event] = msgspec.field(default_factory=dict)

    def find(self, vm_id: int) -> Ref[VmActor] | None:
        """Returns the actor of a VM, if it was started."""
        return self._refs.get(vm_id)

    async def get(self, row: VmRow) -> Ref[VmActor]:
        """Returns the actor of a VM, and starts it if there is none. :raises Problem: 503 it can't be started."""
        ref = self._refs.get(row.id)
        while ref is None and (starting := self._starting.get(row.id)) is not None:
            await starting.wait()
            ref = self._refs.get(row.id)
        if ref is not None:
            return ref
        done = self._starting[row.id] = trio.Event()
        try:
            return await self._start(row)
        except Exception as error:
            with trio.move_on_after(_NOTE_S):
                await self._note_lost(row.id, error)
            raise Problem(
                503, "vm-lost",
                f"VM {row.name!r} is not under control: {self.settings.without_directories(str(error))}", vm=row.name,
                hint="`volantd`'s log says why its actor does not start",
            ) from error  # fmt: skip
        finally:
            del self._starting[row.id]
            done.set()

    async def adopt_all(self) -> None:
        """Starts the actors of all VMs, some at a time."""
        limiter = trio.CapacityLimiter(_STARTS_AT_ONCE)

        async def adopt(row: VmRow) -> None:
            async with limiter:
                try:
                    await self.get(row)
                except Problem as problem:
                    _logger.error("VM %s is not under control: %s", row.name, problem.detail, extra={"vm": row.name})

        async with trio.open_nursery() as nursery:
            for row in self.projection.rows():
                nursery.start_soon(adopt, row)

    async def gave_up(self, event: GaveUp) -> None:
        """Records in the VM's row that the supervisor gave up its actor; the VM keeps running. Retries while the
        journal can't store that, for as long as the supervisor waits."""
        row = self.projection.get(_key_of(event.name))
        if row is None:
            return
        self._refs.pop(row.id, None)
        await self._note_lost(row.id, event.reason)

    async def _note_lost(self, vm_id: int, error: object) -> None:
        """Records in the VM's row that it has no actor, so that clients see the reason and can `recover` it."""
        row = self.projection.by_id(vm_id)
        if row is None:
            return
        lines = str(error).splitlines() or [type(error).__name__]
        what = self.settings.without_directories(lines[0])
        reason = Reason("control_lost", f"its actor keeps failing: {what}")
        text = "VM %s: control is lost; `volar vms recover %s` tries again: %s"
        _logger.error(text, row.name, row.name, error, extra={"vm": row.name})
        while row is not None and row.id not in self._refs:
            lost = msgspec.structs.replace(row, reason=reason)
            try:
                await ask_journal(self.journal, CommitSteps(row.id, row.revision, (Step(lost, reason.message),)))
                return
            except (Problem, StaleRow):
                await trio.sleep(_RETRY_S)
            row = self.projection.by_id(row.id)

    async def _start(self, row: VmRow) -> Ref[VmActor]:
        for vm_id in self._refs.keys() - {row.id for row in self.projection.rows()}:
            del self._refs[vm_id]
        name = _child_name(row)
        child = Child(name, lambda: self.make(row.id), TRANSIENT, start_timeout_s=_START_S, shutdown_s=_SHUTDOWN_S)
        try:
            ref = await self.supervisor.start_child(child)
        except NameTaken:
            # A deleted VM had that name, and its actor is about to end.
            with suppress(NoSuchChild):
                await self.supervisor.stop_child(name)
            ref = await self.supervisor.start_child(child)
        self._refs[row.id] = ref
        return ref


def _child_name(row: VmRow) -> str:
    """Returns the name of a VM's actor in the tree."""
    return row.name if row.project == DEFAULT_PROJECT else f"{row.project}/{row.name}"


def _key_of(child: str) -> Key:
    project, _, name = child.rpartition("/")
    return Key(project or DEFAULT_PROJECT, name)
