"""Moves the VMs of this host to others while it is being drained, with memory and disk.

A moving VM is paused, and its row records that (`VmRow.leaving`), so the next daemon continues the move after a kill.
`docs/explanation/fleet.md` has the steps, and who decides at each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import trio

from volant.chunks import ChunkError
from volant.concurrency import Backoff
from volant.fleet import Departures, EtcdError, Fleet, text_of
from volant.host import Host
from volant.journal import Store
from volant.model import (
    Key,
    Leaves,
    Leaving,
    Left,
    MoveState,
    MoveView,
    Problem,
    Snapshot,
    Status,
    Stays,
    VmRow,
    can_move_now,
    first_few,
    is_at_rest,
    obstacle_to_move,
)
from volant.transfer import Bases, TransferError, Transfers
from volant.vm import DELETED, Vms

from ._arrivals import Arrival
from ._sending import ADMIT_S, Sending

_AT_ONCE = 2
_LOOK_S = 0.5
_HOSTS = 3
"""Hosts that are asked to run a VM, best first."""
_MOVE_S = 3600.0
"""Maximum time of the steps during which a VM is paused, before the move is decided."""
_KNOWN_S = 30.0
"""The time without etcd after which a restarted daemon lets VMs continue that may."""
_PAUSE_S = 60.0
_REMOVE_S = 60.0
_AGAIN_S, _AGAIN_MAX_S = 10.0, 300.0
"""The shortest and the longest delay before another attempt to move a VM."""
_RETRY_S, _RETRY_MAX_S = 0.2, 10.0
_FORGET_TRIES = 3
_UNDRAINED = "its host is not drained any more"
_logger = logging.getLogger("volant.fleet")
_Failed = (Problem, TransferError, ChunkError, EtcdError, OSError)


class _Task(msgspec.Struct, eq=False):
    """A running move."""

    state: MoveState = "waiting"
    to_host: str | None = None
    arrival: Arrival | None = None
    is_decided: bool = False
    """Whether it can't be stopped any more."""
    scope: trio.CancelScope = msgspec.field(default_factory=trio.CancelScope)

    def note(self, arrival: Arrival) -> None:
        self.arrival = arrival


class _Later(msgspec.Struct):
    """A VM that could not move."""

    at: float
    backoff: Backoff
    reason: str


class Evacuation:
    """The VMs that leave this host.

    :param sending: sends the VMs
    :param fleet, vms, transfers: return parts of the daemon that are created later
    """

    def __init__(
        self,
        host: Host,
        store: Store,
        sending: Sending,
        host_name: str,
        *,
        ttl_s: float,
        fleet: Callable[[], Fleet],
        vms: Callable[[], Vms],
        transfers: Callable[[], Transfers],
    ) -> None:
        self._host = host
        self._store = store
        self._sending = sending
        self._name = host_name
        self._ttl_s = ttl_s
        self._fleet = fleet
        self._vms = vms
        self._transfers = transfers
        self._began = 0.0
        self._tasks: dict[int, _Task] = {}
        """Moves by the ids of VMs; those to retry likewise."""
        self._later: dict[int, _Later] = {}

    def leaving(self) -> list[Key]:
        """Returns the moving VMs."""
        return [row.key for row in self._store.projection.rows() if row.leaving is not None]

    def moves(self) -> list[MoveView]:
        """Returns the moves of the VMs of this host, while it is being drained."""
        is_drained = self._fleet().moves_since is not None
        rows = [row for row in self._store.projection.rows() if is_drained or row.leaving is not None]
        return [self._view(row) for row in rows]

    def _view(self, row: VmRow) -> MoveView:
        task, later = self._tasks.get(row.id), self._later.get(row.id)
        state: MoveState = "waiting"
        to_host = reason = None
        if task is not None:
            state, to_host = task.state, task.to_host
        elif row.leaving is not None:
            to_host = row.leaving.to_host
        elif (obstacle := obstacle_to_move(row)) is not None:
            state, reason = "stays", obstacle
        elif not can_move_now(row):
            reason = f"it is {row.status.value}, to be {row.desired.value}"
        elif later is not None:
            state, reason = "stays", later.reason
        arrival = None if task is None else task.arrival
        return MoveView(
            vm=row.name,
            project=row.project,
            state=state,
            to_host=to_host,
            reason=reason,
            done_bytes=0 if arrival is None else arrival.done_bytes,
            total_bytes=0 if arrival is None else arrival.total_bytes,
            moved_bytes=0 if arrival is None else arrival.moved_bytes,
        )

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Moves VMs until cancelled, whenever this host is drained, and ends moves in progress."""
        async with trio.open_nursery() as nursery:
            self._began = trio.current_time()
            task_status.started()
            while True:
                self._look(nursery)
                await trio.sleep(_LOOK_S)

    def _look(self, nursery: trio.Nursery) -> None:
        """Starts the moves that are due, and stops unwanted ones."""
        fleet = self._fleet()
        if fleet.left or (not fleet.is_known and trio.current_time() < self._began + _KNOWN_S):
            # Just after the start, it is not known whether the moves of the daemon before are wanted.
            return
        now, is_drained = trio.current_time(), fleet.moves_since is not None
        if not is_drained:
            self._later.clear()
            for task in self._tasks.values():
                if not task.is_decided:
                    task.scope.cancel()
        rows = sorted(self._store.projection.rows(), key=lambda row: (row.leaving is None, row.id))
        for row in rows:
            later = self._later.get(row.id)
            begins = (
                is_drained
                and len(self._tasks) < _AT_ONCE
                and obstacle_to_move(row) is None
                and can_move_now(row)
                and (later is None or now >= later.at)
            )
            if row.id not in self._tasks and (begins or row.leaving is not None):
                self._tasks[row.id] = task = _Task()
                nursery.start_soon(self._run, row, task)

    async def _run(self, row: VmRow, task: _Task) -> None:
        try:
            await self._move(row, task)
        finally:
            self._tasks.pop(row.id, None)

    # One move

    async def _move(self, row: VmRow, task: _Task) -> None:
        leaving, reason = row.leaving, _UNDRAINED
        if leaving is not None and leaving.deciding:
            # A decision that an earlier daemon requested.
            reason = "the daemon was restarted during the decision, and the other host has not received the VM"
        else:
            with task.scope:
                try:
                    with trio.fail_after(ADMIT_S + _MOVE_S):
                        leaving = await self._prepare(row, leaving, task)
                except _Failed as error:
                    reason = error.detail if isinstance(error, Problem) else str(error)
                except trio.TooSlowError:
                    reason = f"it has taken longer than {ADMIT_S + _MOVE_S:g} s"
        task.is_decided = True
        now = self._store.projection.by_id(row.id)
        if now is None:
            return
        if now.leaving is None:
            # It was not begun.
            if reason != _UNDRAINED:
                self._put_off(row, reason)
            return
        leaving, given = now.leaving, False
        task.to_host = leaving.to_host
        if leaving.deciding:
            task.state = "deciding"
            departures = Departures(
                self._fleet().claims, self._name, ttl_s=self._ttl_s, now=self._host.clock.boottime
            )  # fmt: skip
            given = await departures.conclude(text_of(row.key), leaving)
            if not given and reason == _UNDRAINED:
                reason = f"the host {leaving.to_host!r} gives no sign of life any more, or does not have all of it"
        task.state = "ending"
        if given:
            await self._until_done(partial(self._leave, row, leaving))
            _logger.info("VM %s has moved to %s", row.name, leaving.to_host)
        else:
            await self._until_done(partial(self._stay, row, leaving, reason))
        await self._forget(leaving, left=given)

    async def _prepare(self, row: VmRow, leaving: Leaving | None, task: _Task) -> Leaving:
        """Executes the steps before the decision; returns the move, for which etcd may be asked.

        Raises the errors in `_Failed`: the VM stays, unless its row says otherwise.
        """
        if self._fleet().moves_since is None:
            raise Problem(409, "not-drained", _UNDRAINED)
        bases = await self._transfers().bases_of(row)
        if leaving is None:
            leaving = await self._admit(row, bases, task)
            row = await self._vms().move(row, Leaves(leaving))
            leaving = row.leaving or leaving
        task.to_host, task.state = leaving.to_host, "preparing"
        snapshot = await self._save(row, leaving)
        task.state = "copying"
        async with self._sending.opened(snapshot) as outgoing:
            await self._sending.send(outgoing, leaving, bases, task.note)
        leaving = msgspec.structs.replace(leaving, deciding=True)
        # From here on only etcd knows.
        await self._vms().move(row, Leaves(leaving))
        return leaving

    async def _admit(self, row: VmRow, bases: Bases, task: _Task) -> Leaving:
        """Finds a host that can run the VM, which keeps running. :raises Problem: none can. :raises EtcdError:"""
        claim = await self._fleet().claims.get(text_of(row.key))
        if claim is None or claim.owner != self._name or claim.taking:
            raise Problem(503, "claim-unknown", "etcd does not say that it is a VM of this host", vm=row.name)
        reasons = []
        for host in self._sending.hosts_for(row)[:_HOSTS]:
            leaving = Leaving(
                id=self._host.random.new_id()[:12],
                vm=claim.vm,
                epoch=claim.epoch,
                from_host=self._name,
                to_host=host,
                at=self._host.clock.now(),
                desired=row.desired,
            )
            try:
                await self._sending.admit(row, leaving, bases, task.note)
                return leaving
            except Problem as problem:
                reasons.append(f"{host}: {problem.detail}")
        raise Problem(503, "no-host", f"no host can have it ({first_few(reasons)})", vm=row.name)

    async def _save(self, row: VmRow, leaving: Leaving) -> Snapshot:
        """Returns the snapshot of a VM that is being paused or at rest. :raises Problem:"""
        key = Key(row.project, leaving.snapshot)
        snapshot = self._store.projection.snapshots.get(key)
        if snapshot is not None and snapshot.status == "ready":
            # A snapshot of an earlier daemon. The VM has not run since.
            return snapshot
        if not is_at_rest(row):
            await self._until_paused(row)
        text = f"VM {row.name} moves with it from {leaving.from_host} to {leaving.to_host}"
        return await self._sending.take_snapshot(row, leaving.snapshot, text, move=leaving.id)

    async def _until_paused(self, row: VmRow) -> None:
        """Waits until a VM is paused. :raises Problem: 503, it was not paused."""
        _, paused = await self._vms().wait(row.id, {Status.PAUSED}, _PAUSE_S)
        if paused is None or paused.status is not Status.PAUSED:
            why = "" if paused is None or paused.reason is None else f": {paused.reason.message}"
            raise Problem(503, "pause-failed", f"VM {row.name!r} was not paused{why}", vm=row.name)

    async def _leave(self, row: VmRow, leaving: Leaving) -> bool:
        """Removes a VM that belongs to another host; returns whether it is completely removed."""
        await self._vms().move(row, Left(leaving.to_host))
        _, after = await self._vms().wait(row.id, {DELETED}, _REMOVE_S)
        return after is None

    async def _stay(self, row: VmRow, leaving: Leaving, reason: str) -> bool:
        await self._vms().move(row, Stays(leaving.id, reason))
        _logger.warning("VM %s stays on this host: %s", row.name, reason, extra={"vm": row.name})
        if reason != _UNDRAINED:
            self._put_off(row, reason)
        return True

    async def _until_done(self, work: Callable[[], Awaitable[bool]]) -> None:
        """Repeats the last step of a move while the journal fails."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            try:
                if await work():
                    return
            except Problem as problem:
                _logger.warning("a move is not ended yet: %s", problem.detail)
            await backoff.pause()

    async def _forget(self, leaving: Leaving, *, left: bool) -> None:
        """Removes the data of a move from etcd. Remains are harmless."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        for _ in range(_FORGET_TRIES):
            try:
                await self._fleet().claims.end_move(leaving.vm, leaving.id, left=left)
                return
            except EtcdError:
                await backoff.pause()

    def _put_off(self, row: VmRow, reason: str) -> None:
        before = self._later.get(row.id)
        there = {each.id for each in self._store.projection.rows()}
        self._later = {vm_id: later for vm_id, later in self._later.items() if vm_id in there}
        if before is None or before.reason != reason:
            _logger.warning("VM %s does not move: %s", row.name, reason, extra={"vm": row.name})
        backoff = Backoff(_AGAIN_S, _AGAIN_MAX_S) if before is None else before.backoff
        self._later[row.id] = _Later(trio.current_time() + backoff.take(), backoff, reason)
