"""The lifecycle of VMs: creates, commands, awaits and deletes them, and drains the host."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import msgspec
import trio

from actors import ActorDown, AskTimeout, Ref, Request
from volant.concurrency import Backoff
from volant.journal import (
    CreateRow,
    EndDrain,
    EventCursor,
    EventFrame,
    EventGap,
    IdempotencyKey,
    Journal,
    SetDrain,
    Store,
    ask_journal,
)
from volant.model import (
    READY,
    Command,
    CommandRequest,
    CreateVm,
    Desired,
    EventId,
    Problem,
    Status,
    VmRow,
    current_caller,
    draining,
    name_taken,
    no_such_vm,
    readiness,
    refused,
    settled,
    size_of,
)

from ._actors import VmActors
from ._capacity import Capacity
from ._deps import Signal
from ._machine_spec import uses_passt
from .messages import Ask

R = TypeVar("R")
_ASK_S = 60.0
_DELETE_S = 60.0
_RETRY_S, _RETRY_MAX_S = 0.05, 2.0
_DELETE_ALL_PAUSE_S = 0.05
_logger = logging.getLogger("volant.vm")

Wait = Literal["met", "failed", "timeout"]
DELETED: Literal["deleted"] = "deleted"
"""May be waited for like a status."""


class Version(NamedTuple):
    """One committed state of one VM, whatever has or gets its name."""

    vm_id: int
    revision: int


@dataclass(eq=False)
class Lifecycle:
    """The lifecycle of one daemon's VMs."""

    _store: Store
    _journal: Ref[Journal]
    _actors: VmActors
    _capacity: Capacity
    _workload_changed: Signal
    """Sent when the workload of some VM has another state."""

    async def create(self, request: CreateVm, *, key: IdempotencyKey | None = None) -> VmRow:
        """Makes a VM; durable when this returns. A cancelled caller cancels nothing.

        :raises Problem: 400 the request, 404 no such plugin, 409 name taken or plugin disabled, 503 no capacity or
            the daemon drains.
        :raises DuplicateRequest: the request was answered before.
        """
        plugin = self._store.projection.plugins.get(request.plugin)
        # Without the plugin the journal refuses the request.
        cpu_cores, memory_mb = 0, request.memory_mb or 0
        if plugin is not None:
            cpu_cores, memory_mb = size_of(request, plugin.manifest)
            await self._capacity.check_image(memory_mb, plugin.manifest)
        if self._store.projection.get(request.name) is not None:
            # Room would not help.
            raise name_taken(request.name)
        self._capacity.check_disk(request)
        with self._capacity.reserve(self._capacity.need_of_request(request, cpu_cores, memory_mb)):
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_S):
                row = await self._ask(CreateRow(request, key, current_caller.get()))
                await self._actors.get(row)
                return row
        raise Problem(503, "journal-slow", "the VM was not made in time; it may still appear", vm=request.name)

    async def apply(
        self,
        name: str,
        request: CommandRequest,
        *,
        only_at: Collection[Version] | None = None,
        key: IdempotencyKey | None = None,
    ) -> VmRow:
        """Changes what a VM should be, if it is at one of the versions `only_at`; durable when this returns.

        :raises Problem: 404, 409 not legal now, 412 it is at another version, 503 (among others: it would start, and
            the daemon drains).
        :raises DuplicateRequest: the request was answered before.
        """
        row = self._store.projection.require(name)
        request = msgspec.structs.replace(request, caller=current_caller.get())
        revisions = None
        if only_at is not None:
            revisions = frozenset(version.revision for version in only_at if version.vm_id == row.id)
        self._check_start(row, request.command)
        deadline = trio.current_time() + _ASK_S
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            ref = await self._actors.get(row)
            try:
                return await ref.ask(Ask(request, revisions, key), timeout_s=_ASK_S)
            except (ActorDown, AskTimeout) as error:
                # The actor restarts, and may have taken the command or not: the row tells.
                after = self._store.projection.by_id(row.id)
                if after is None:
                    if request.command is Command.DELETE:
                        return row
                    raise no_such_vm(name) from error
                if key is None and _is_applied(after, request.command):
                    return after
                if isinstance(error, AskTimeout) or trio.current_time() + backoff.next_s > deadline:
                    raise _busy(row, error) from error
            await backoff.pause()

    async def delete(self, name: str, *, only_at: Collection[Version] | None = None) -> None:
        """Deletes a VM, if it is at one of the versions `only_at`, and returns once nothing of it is left on the host.

        A cancelled caller cancels nothing. A second delete joins the first.

        :raises Problem: 404; 412 it is at another version; 503 after 60 s, and says what is left.
        """
        row = await self.apply(name, CommandRequest(Command.DELETE), only_at=only_at)
        _, after = await self.wait(row.id, {DELETED}, _DELETE_S)
        if after is not None:
            reason = f": {after.reason.message}" if after.reason else ""
            raise Problem(
                503, "delete-slow",
                f"VM {name!r} is not gone after {_DELETE_S:g} s, phase {after.phase.value!r}{reason}",
                vm=name, hint="it goes on being deleted; DELETE again to wait on",
            )  # fmt: skip

    async def delete_all(self, timeout_s: float) -> list[str]:
        """Deletes every VM and admits no more; returns the names of those that are left after `timeout_s` seconds."""
        self._capacity.close()
        projection = self._store.projection
        with trio.move_on_after(timeout_s):
            # A VM that was being made when this began has its row a moment later.
            while projection.rows() or self._capacity.is_reserved:
                async with trio.open_nursery() as nursery:
                    for row in projection.rows():
                        nursery.start_soon(self._delete_at_once, row.name)
                    nursery.start_soon(trio.sleep, _DELETE_ALL_PAUSE_S)
        return [row.name for row in projection.rows()]

    async def wait(
        self, vm_id: int, states: Collection[str], timeout_s: float, *, since: EventId | None = None
    ) -> tuple[Wait, VmRow | None]:
        """Waits until a VM is in one of `states` (`deleted` among them) or comes to rest outside them.

        States that it passed through after the event `since` count too, so that none is too short to be seen.
        """
        store = self._store
        with trio.move_on_after(timeout_s):
            async with store.events.cursor(since if since is not None else store.projection.last_event) as cursor:
                while True:
                    changed = self._workload_changed.event
                    row = store.projection.by_id(vm_id)
                    if row is None:
                        return ("met" if DELETED in states else "failed"), None
                    if row.status in states:
                        return "met", row
                    if READY in states and (found := readiness(row)) is not None:
                        return found, row
                    if cursor.position.seq >= store.projection.last_event.seq and _came_to_rest(row):
                        return "failed", row
                    taken = await _take_before(cursor, changed)
                    if taken is None or isinstance(taken, EventGap):
                        continue
                    if not taken:
                        break
                    if any(frame.event.vm_id == vm_id and frame.event.status in states for frame in taken):
                        return "met", store.projection.by_id(vm_id)
        return "timeout", store.projection.by_id(vm_id)

    # Draining

    async def drain(self, stop_grace_s: float | None = None) -> None:
        """Lets no VM be made or start, until `undrain`; durable when this returns.

        VMs that are up go on. With a grace, in seconds, they are stopped and start again afterwards (`keep_drained`).

        :raises Problem: 503.
        """
        drain = await self._ask(SetDrain(stop_grace_s))
        since = drain.since.strftime("%Y-%m-%d %H:%M:%S UTC")
        _logger.warning("draining since %s: no VM starts until `volar system undrain`", since)

    async def undrain(self) -> None:
        """Lets VMs start again, those that are due among them. :raises Problem: 503."""
        await self._ask(EndDrain())
        _logger.warning("not draining: VMs start")

    async def stop_for_drain(self, row: VmRow, grace_s: float) -> None:
        """Stops a VM that is up and at the version of `row`; it starts again once the daemon does not drain.

        :raises Problem: 412 it has changed; 503.
        """
        ref = await self._actors.get(row)
        stop = Ask(CommandRequest(Command.RESTART, grace_s=grace_s, aside=True), frozenset({row.revision}))
        try:
            await ref.ask(stop, timeout_s=_ASK_S)
        except (ActorDown, AskTimeout) as error:
            raise _busy(row, error) from error

    def _check_start(self, row: VmRow, command: Command) -> None:
        """:raises Problem: the VM would start, and must not now."""
        starts = command is Command.RESTART and row.status is not Status.DELETING
        starts |= command is Command.START and row.status in (Status.STOPPED, Status.CRASHED, Status.STOPPING)
        if not starts:
            return
        drain = self._store.projection.drain
        if drain is not None:
            raise draining(drain, vm=row.name)
        refusal = self._store.networking.user_refused
        if refusal and uses_passt(row):
            raise refused(refusal, vm=row.name)
        if row.status in (Status.STOPPED, Status.CRASHED):
            self._capacity.admit_again(row)

    async def _delete_at_once(self, name: str) -> None:
        try:
            await self.apply(name, CommandRequest(Command.DELETE, grace_s=0))
            await self.delete(name)
        except Problem as problem:
            if problem.status != 404:
                _logger.error("VM %s: %s", name, problem.detail, extra={"vm": name})

    async def _ask(self, message: Request[R]) -> R:
        return await ask_journal(self._journal, message)


async def _take_before(cursor: EventCursor, changed: trio.Event) -> list[EventFrame] | EventGap | None:
    """Returns what the cursor takes next; None: `changed` came first."""
    taken: list[EventFrame] | EventGap | None = None
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            await changed.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait)
        taken = await cursor.take()
        nursery.cancel_scope.cancel()
    return taken


def _busy(row: VmRow, error: Exception) -> Problem:
    return Problem(
        503, "vm-busy", f"VM {row.name!r} did not take the request: {error}", vm=row.name,
        hint="look at the VM and send it again",
    )  # fmt: skip


def _came_to_rest(row: VmRow) -> bool:
    """Whether nothing more will happen to a VM that does not run (contract: Waiting)."""
    return row.status in (Status.STOPPED, Status.CRASHED) and settled(row)


def _is_applied(row: VmRow, command: Command) -> bool:
    """Whether a command whose answer was lost has changed the row."""
    match command:
        case Command.STOP:
            return row.desired is Desired.STOPPED
        case Command.START:
            return row.desired is Desired.RUNNING and row.generation > row.booted
        case Command.PAUSE:
            return row.desired is Desired.PAUSED
        case Command.DELETE:
            return row.desired is Desired.DELETED
        case _:
            return False
