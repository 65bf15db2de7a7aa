"""The lifecycle of VMs: creates, commands, waits for and deletes them, and drains the host."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import msgspec
import trio

from actors import ActorDown, AskTimeout, Ref, Request
from volant.concurrency import Backoff
from volant.directories import Virtiofsd
from volant.journal import (
    ArriveRow,
    CreateRow,
    EndDrain,
    EventCursor,
    EventFrame,
    EventGap,
    IdempotencyKey,
    Journal,
    Names,
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
    HostLoad,
    Key,
    Leaves,
    Left,
    Manifest,
    Movable,
    NetworkChoice,
    Problem,
    Replica,
    Replicated,
    Snapshot,
    Status,
    Stays,
    VmRow,
    check_ports_free,
    check_volumes_free,
    current_cause,
    draining,
    egress_unavailable,
    is_at_rest,
    is_restricted,
    kind_of,
    name_taken,
    no_such_vm,
    parse_mounts,
    readiness,
    refused,
    settled,
    size_of,
    unavailable,
)

from ._actors import VmActors
from ._capacity import Capacity, memory_need
from ._deps import Signal
from ._fence import VmFence
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
"""A possible target of a wait, like a status."""


class Version(NamedTuple):
    """One committed state of one VM, independent of its name."""

    vm_id: int
    revision: int


@dataclass(eq=False)
class Lifecycle:
    """The lifecycle of one daemon's VMs."""

    _store: Store
    _journal: Ref[Journal]
    _actors: VmActors
    _capacity: Capacity
    _virtiofsd: Virtiofsd
    _names: Names
    _workload_changed: Signal
    """Sent when the state of a VM's workload changes."""
    _fence: VmFence

    async def create(
        self,
        request: CreateVm,
        project: str,
        *,
        manifest: Manifest | None = None,
        key: IdempotencyKey | None = None,
        taken_over: Movable | None = None,
    ) -> VmRow:
        """Creates a VM in a project; durable when this returns. A cancelled caller cancels nothing.

        :param manifest: the manifest made from the request's OCI image; None for the plugin's
        :param taken_over: this host has taken over the VM from another one, and has its name
        :raises Problem: 400, the request; 404, no such plugin; 409, the name is taken or the plugin disabled; 503, no
            capacity, or the daemon drains.
        :raises DuplicateRequest: the request was answered before.
        """
        plugin = self._store.projection.plugin(Key(project, request.plugin))
        wanted = manifest or (plugin.manifest if plugin is not None else None)
        if wanted is not None:
            await self._capacity.check_image(size_of(request, wanted)[1], wanted)
        if self._store.projection.get(Key(project, request.name)) is not None:
            # Room would not help.
            raise name_taken(request.name)
        if wanted is not None:
            self._capacity.check_disk(request, wanted)
        await self._virtiofsd.check(parse_mounts(request.volumes).directories, vm=request.name)
        movable = taken_over
        if movable is None and request.failover != "never":
            movable = self._fence.movable(request, manifest)
        with self._capacity.reserve(self._capacity.need_of_request(request, wanted)):
            async with nullcontext() if taken_over else self._names.claimed([Key(project, request.name)], movable):
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_S):
                    row = await self._ask(
                        CreateRow(request, project, key, manifest=manifest, starts=True, movable=movable)
                    )
                    await self._actors.get(row)
                    return row
        raise Problem(503, "journal-slow", "the VM was not made in time; it may still appear", vm=request.name)

    async def apply(
        self,
        vm: Key,
        request: CommandRequest,
        *,
        only_at: Collection[Version] | None = None,
        key: IdempotencyKey | None = None,
    ) -> VmRow:
        """Changes the desired state of a VM, if it is at one of the versions `only_at`; durable when this returns.

        :raises Problem: 404; 409, not legal now; 412, it is at another version; 503, among others if it would start and
            the daemon drains.
        :raises DuplicateRequest: the request was answered before.
        """
        row = self._store.projection.require(vm)
        request = msgspec.structs.replace(request, cause=current_cause.get())
        revisions = None
        if only_at is not None:
            revisions = frozenset(version.revision for version in only_at if version.vm_id == row.id)
        if _starts(row, request.command):
            await self._check_start(row)
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
                    raise no_such_vm(vm.name) from error
                if key is None and _is_applied(after, request.command):
                    return after
                if isinstance(error, AskTimeout) or trio.current_time() + backoff.next_s > deadline:
                    raise _busy(row, error) from error
            await backoff.pause()

    async def delete(self, vm: Key, *, only_at: Collection[Version] | None = None) -> None:
        """Deletes a VM, if it is at one of the versions `only_at`, and returns once it is completely removed from the
        host.

        A cancelled caller cancels nothing. A second delete joins the first.

        :raises Problem: 404; 412, it is at another version; 503, after 60 s, with the remaining parts, or if another
            host has taken it over in the meantime.
        """
        row = await self.apply(vm, CommandRequest(Command.DELETE), only_at=only_at)
        _, after = await self.wait(row.id, {DELETED}, _DELETE_S)
        if after is not None:
            reason = f": {after.reason.message}" if after.reason else ""
            raise Problem(
                503, "delete-slow",
                f"VM {vm.name!r} is not gone after {_DELETE_S:g} s, phase {after.phase.value!r}{reason}",
                vm=vm.name, hint="the deletion continues; DELETE again to wait for it",
            )  # fmt: skip
        self._fence.check_deleted(row)
        await self._names.free(vm)

    async def delete_all(self, timeout_s: float) -> list[str]:
        """Deletes every VM and admits no more; returns the names of those that remain after `timeout_s` seconds."""
        self._capacity.close()
        projection = self._store.projection
        with trio.move_on_after(timeout_s):
            # A VM that was being made when this began has its row a moment later.
            while projection.rows() or self._capacity.is_reserved:
                async with trio.open_nursery() as nursery:
                    for row in projection.rows():
                        nursery.start_soon(self._delete_at_once, row.key)
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

    def load(self) -> HostLoad:
        """Returns the load of the host."""
        rows = self._store.projection.rows()
        return HostLoad(
            vms=len(rows),
            cpu_cores=sum(row.cpu_cores for row in rows if row.status is not Status.STOPPED),
            free_memory_mb=self._capacity.free_memory_mb(),
            free_disk_mb=self._capacity.free_disk_mb(),
            event_id=str(self._store.projection.last_event),
        )

    # Draining

    async def drain(self, stop_grace_s: float | None = None) -> None:
        """Prevents the creation and start of VMs until `undrain`; durable when this returns. Running VMs keep running.
        With a grace, in seconds, they are stopped and start again afterwards (`keep_drained`). :raises Problem: 503."""
        drain = await self._ask(SetDrain(stop_grace_s))
        since = drain.since.strftime("%Y-%m-%d %H:%M:%S UTC")
        _logger.warning("draining since %s: no VM starts until `volar system undrain`", since)

    async def undrain(self) -> None:
        """Allows VMs to start again, and starts due ones. :raises Problem: 503."""
        await self._ask(EndDrain())
        _logger.warning("not draining: VMs start")

    async def stop_for_drain(self, row: VmRow, grace_s: float) -> None:
        """Stops a running VM that is at the version of `row`; it starts again once the daemon does not drain. :raises
        Problem: 412, it has changed; 503."""
        ref = await self._actors.get(row)
        stop = Ask(CommandRequest(Command.RESTART, grace_s=grace_s, aside=True), frozenset({row.revision}))
        try:
            await ref.ask(stop, timeout_s=_ASK_S)
        except (ActorDown, AskTimeout) as error:
            raise _busy(row, error) from error

    # Moves

    async def move(self, row: VmRow, request: Leaves | Stays | Left) -> VmRow:
        """Records that a VM leaves for another host, stays after all, or ends as it has left; durable when this
        returns. :raises Problem: 409, it can't move in its state; 503."""
        return await self._note(row, request)

    async def note_replica(self, row: VmRow, replica: Replica) -> None:
        """Records the copies of a VM on other hosts; durable when this returns. :raises Problem: 503."""
        await self._note(row, Replicated(replica))

    async def _note(self, row: VmRow, request: Leaves | Stays | Left | Replicated) -> VmRow:
        if self._store.projection.by_id(row.id) is None:
            return row
        ref = await self._actors.get(row)
        try:
            return await ref.ask(Ask(request), timeout_s=_ASK_S)
        except (ActorDown, AskTimeout) as error:
            after = self._store.projection.by_id(row.id)
            if after is None:
                return row
            raise _busy(row, error) from error

    async def arrive(self, snapshot: Snapshot, epoch: int) -> VmRow:
        """Continues a VM here from the snapshot of its move; the request may be a repetition. Durable when this
        returns. :raises Problem: as `ArriveRow`; 503, no capacity."""
        there = self._store.projection.get(snapshot.vm.key)
        if there is not None and there.arrived == snapshot.move:
            await self._actors.get(there)
            return there
        with self._room_for(snapshot.vm):
            row = await self._ask(ArriveRow(snapshot.key, epoch))
            await self._actors.get(row)
            return row

    def check_arrival(self, row: VmRow) -> None:
        """Checks that a VM of another host can continue here. :raises Problem: 409, 503, it can't now."""
        projection = self._store.projection
        if projection.get(row.key) is not None:
            raise name_taken(row.name)
        if projection.drain is not None:
            raise draining(projection.drain, vm=row.name)
        others = ((other.key, port) for other in projection.rows() for port in other.ports)
        check_ports_free(row.project, row.ports, others)
        networking, kind = self._store.networking, kind_of(row.network)
        if networking.user_refused and uses_passt(row):
            raise refused(networking.user_refused, vm=row.name)
        if kind in networking.obstacles:
            choice = NetworkChoice(row.network, row.network_reason)
            raise unavailable(choice, networking.obstacles[kind], vm=row.name)
        if kind in networking.egress_obstacles and is_restricted(row.egress):
            raise egress_unavailable(networking.egress_obstacles[kind], vm=row.name)
        with self._room_for(row):
            pass

    def _room_for(self, row: VmRow) -> AbstractContextManager[None]:
        """Reserves the memory of an arriving VM for a block, if it continues at once. :raises Problem: 503"""
        return nullcontext() if is_at_rest(row) else self._capacity.reserve(memory_need(row.memory_mb, clone=True))

    async def _check_start(self, row: VmRow) -> None:
        """Checks that a VM may start. :raises Problem: it must not start now."""
        drain = self._store.projection.drain
        if drain is not None:
            raise draining(drain, vm=row.name)
        refusal = self._store.networking.user_refused
        if refusal and uses_passt(row):
            raise refused(refusal, vm=row.name)
        if row.volumes:
            check_volumes_free(row, self._store.projection.rows(), self._store.projection.volumes.values())
        await self._virtiofsd.check(row.directories, vm=row.name)
        if row.status in (Status.STOPPED, Status.CRASHED):
            self._capacity.admit_again(row)

    async def _delete_at_once(self, vm: Key) -> None:
        try:
            await self.apply(vm, CommandRequest(Command.DELETE, grace_s=0))
            await self.delete(vm)
        except Problem as problem:
            if problem.status != 404:
                _logger.error("VM %s: %s", vm.name, problem.detail, extra={"vm": vm.name})

    async def _ask(self, message: Request[R]) -> R:
        return await ask_journal(self._journal, message)


async def _take_before(cursor: EventCursor, changed: trio.Event) -> list[EventFrame] | EventGap | None:
    """Returns the next item of the cursor, None if `changed` came first."""
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


def _starts(row: VmRow, command: Command) -> bool:
    """Returns whether a command starts a VM."""
    if command is Command.RESTART:
        return row.status is not Status.DELETING
    return command is Command.START and row.status in (Status.STOPPED, Status.CRASHED, Status.STOPPING)


def _came_to_rest(row: VmRow) -> bool:
    """Returns whether the state of a VM that does not run is final (contract: Waiting)."""
    return row.status in (Status.STOPPED, Status.CRASHED) and settled(row)


def _is_applied(row: VmRow, command: Command) -> bool:
    """Returns whether a command whose answer was lost has changed the row."""
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
