"""Replicates VMs of this host with `failover` `restore`: at intervals, other hosts receive a copy of each, with memory
and disk, from which one of them continues it when this host is lost. `docs/explanation/fleet.md` has the steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta

import msgspec
import trio

from volant.chunks import ChunkError
from volant.concurrency import Backoff
from volant.fleet import Claim, EtcdError, Fleet, text_of
from volant.host import Host
from volant.journal import Store
from volant.model import (
    REPLICA,
    Desired,
    Leaving,
    Movable,
    Problem,
    Reason,
    Replica,
    Replicate,
    Status,
    VmRow,
    first_few,
    is_copyable,
    replicate_every_s,
)
from volant.transfer import Bases, TransferError, Transfers
from volant.vm import VmFence, Vms

from ._sending import Sending

_AT_ONCE = 2
_LOOK_S = 1.0
_WHOLE_S = 3600.0
"""Maximum time for one replica."""
_HOSTS_MORE = 2
"""Hosts that are asked in addition to the wanted number."""
_AGAIN_S, _AGAIN_MAX_S = 10.0, 300.0
"""The shortest and the longest delay before another attempt to replicate a VM."""
_logger = logging.getLogger("volant.fleet")
_Failed = (Problem, TransferError, ChunkError, EtcdError, OSError, trio.TooSlowError)


class _State(msgspec.Struct, eq=False):
    """The state of a replicated VM, since this daemon has started."""

    not_before: float = 0.0
    backoff: Backoff = msgspec.field(default_factory=lambda: Backoff(_AGAIN_S, _AGAIN_MAX_S))
    has_run: bool = True
    """Whether it may have run since it was copied."""


class Replication:
    """The replicas that this host makes of its VMs.

    :param fence: VMs don't run while it is closed
    :param fleet, vms, transfers: return parts of the daemon that are created later
    """

    def __init__(
        self,
        host: Host,
        store: Store,
        sending: Sending,
        fence: VmFence,
        host_name: str,
        *,
        fleet: Callable[[], Fleet],
        vms: Callable[[], Vms],
        transfers: Callable[[], Transfers],
    ) -> None:
        self._host = host
        self._store = store
        self._sending = sending
        self._fence = fence
        self._name = host_name
        self._fleet = fleet
        self._vms = vms
        self._transfers = transfers
        self._states: dict[int, _State] = {}
        """States by the ids of VMs; running copies likewise."""
        self._copying: set[int] = set()
        self._sent: set[str] = set()
        """The ids of replicas that are being sent."""

    def is_sent(self, replica: str) -> bool:
        """Returns whether a replica with that id is being sent to other hosts."""
        return replica in self._sent

    async def keep(self) -> None:
        """Replicates VMs until cancelled, each when it is due, some at a time."""
        async with trio.open_nursery() as nursery:
            while True:
                self._look(nursery)
                await trio.sleep(_LOOK_S)

    def _look(self, nursery: trio.Nursery) -> None:
        fleet = self._fleet()
        if fleet.left or not fleet.is_known or not self._fence.is_open:
            return
        wanted = self._wanted()
        self._states = {row.id: self._states.get(row.id) or _State() for row, _, _ in wanted}
        # The VM that has waited longest comes first.
        for row, movable, replicate in sorted(wanted, key=lambda each: self._states[each[0].id].not_before):
            state = self._states[row.id]
            state.has_run = state.has_run or row.status is Status.RUNNING
            may_begin = row.id not in self._copying and len(self._copying) < _AT_ONCE
            if may_begin and self._is_due(row, replicate, state):
                self._copying.add(row.id)
                nursery.start_soon(self._run, row, movable, replicate, state)

    def _wanted(self) -> list[tuple[VmRow, Movable, Replicate]]:
        """Returns the VMs to replicate."""
        return [
            (row, row.movable, row.movable.request.replicate)
            for row in self._store.projection.rows()
            if row.movable is not None and row.movable.request.replicate is not None
        ]

    def _is_due(self, row: VmRow, replicate: Replicate, state: _State) -> bool:
        if row.leaving is not None or not is_copyable(row) or trio.current_time() < state.not_before:
            return False
        newest, now = self._fleet().replica_of(row.key), self._host.clock.now()
        if newest is None or not newest.copies.keys() - {self._name}:
            return True
        # The clock may have been set back.
        return state.has_run and not timedelta(0) <= now - newest.at < timedelta(seconds=replicate_every_s(replicate))

    async def _run(self, row: VmRow, movable: Movable, replicate: Replicate, state: _State) -> None:
        replica = self._host.random.new_id()[:12]
        self._sent.add(replica)
        began = trio.current_time()
        try:
            with trio.fail_after(_WHOLE_S):
                made = await self._replicate(row, movable, replicate, state, replica)
        except _Failed as error:
            state.not_before = trio.current_time() + state.backoff.take()
            made = self._not_made(row, _reason_of(error))
        else:
            state.not_before = began + replicate_every_s(replicate)
            state.backoff.reset()
        finally:
            self._sent.discard(replica)
            self._copying.discard(row.id)
        await self._note(row, made)

    async def _note(self, row: VmRow, made: Replica) -> None:
        """Records the result in the VM; the log has the complete reason."""
        before = self._store.projection.by_id(row.id)
        if before is None:
            return
        if made.reason is not None:
            known = None if before.replica is None else before.replica.reason
            if known is None or known.code != made.reason.code:
                _logger.warning("VM %s: %s", row.name, made.reason.message, extra={"vm": row.name})
            # All clients may read it.
            message = self._vms().settings.without_directories(made.reason.message)
            made = msgspec.structs.replace(made, reason=msgspec.structs.replace(made.reason, message=message))
        try:
            await self._vms().note_replica(before, made)
        except Problem as problem:
            # The next one says it again.
            _logger.warning("VM %s does not show its replica: %s", row.name, problem.detail, extra={"vm": row.name})

    def _not_made(self, row: VmRow, reason: Reason) -> Replica:
        """Returns the replica of a VM on other hosts, after a newer one failed."""
        newest = self._fleet().replica_of(row.key)
        # A replica from which this host itself continued is no copy on another host.
        hosts = () if newest is None else tuple(sorted(newest.copies.keys() - {self._name}))
        return Replica(hosts=hosts, at=newest.at if newest is not None and hosts else None, reason=reason)

    async def _replicate(
        self, row: VmRow, movable: Movable, replicate: Replicate, state: _State, replica: str
    ) -> Replica:
        """Makes a replica. Raises the errors in `_Failed`: the previous one stays the newest."""
        mine = Claim(movable.id, self._name, movable.epoch, movable.request.failover)
        bases = await self._transfers().bases_of(row)
        leavings, reasons = await self._admit(row, mine, bases, replicate.to)
        state.has_run = row.status is Status.RUNNING
        text = f"replica of VM {row.name} for {', '.join(leaving.to_host for leaving in leavings)}"
        snapshot = await self._sending.take_snapshot(row, f"{REPLICA}{replica}", text, move=replica)
        arrived: list[Leaving] = []
        async with self._sending.opened(snapshot) as outgoing:
            for leaving in leavings:
                dated = msgspec.structs.replace(leaving, at=snapshot.created_at)
                try:
                    await self._sending.send(outgoing, dated, bases, lambda arrival: None)
                except Problem as problem:
                    reasons.append(f"{leaving.to_host}: {problem.detail}")
                else:
                    arrived.append(dated)
        if not arrived:
            raise Problem(503, "replica-not-sent", f"no host has got it ({first_few(reasons)})", vm=row.name)
        copies = {leaving.to_host: (leaving.id, leaving.arrival) for leaving in arrived}
        if not await self._fleet().replicas.commit(text_of(row.key), mine, snapshot.created_at, copies):
            raise Problem(503, "replica-refused", "etcd has another owner for the VM, or a host has given its copy up")
        return Replica(
            hosts=tuple(copies),
            at=snapshot.created_at,
            reason=None
            if len(copies) >= replicate.to
            else Reason("replica_partial", f"{len(copies)} of {replicate.to} hosts have it ({first_few(reasons)})"),
        )

    async def _admit(self, row: VmRow, mine: Claim, bases: Bases, count: int) -> tuple[list[Leaving], list[str]]:
        """Finds hosts that can run the VM, at most `count`, and the reasons why others can't.

        :raises Problem: none can
        """
        hosts = self._sending.hosts_for(row)
        newest = self._fleet().replica_of(row.key)
        # Hosts with a copy lack the least data.
        hosts.sort(key=lambda host: newest is None or host not in newest.copies)
        found: list[Leaving] = []
        reasons: list[str] = []
        for host in hosts[: count + _HOSTS_MORE]:
            leaving = Leaving(
                id=self._host.random.new_id()[:12],
                vm=mine.vm,
                epoch=mine.epoch,
                from_host=self._name,
                to_host=host,
                at=self._host.clock.now(),
                # As with a VM that is booted again: what it should be then is known elsewhere.
                desired=Desired.RUNNING,
                replica=True,
            )
            try:
                await self._sending.admit(row, leaving, bases, lambda arrival: None)
            except Problem as problem:
                reasons.append(f"{host}: {problem.detail}")
            else:
                found.append(leaving)
            if len(found) == count:
                break
        if not found:
            raise Problem(503, "no-host", f"no host can have a replica ({first_few(reasons)})", vm=row.name)
        if len(found) < count and not reasons:
            reasons.append(f"no more than {len(found)} of the other hosts could have the VM")
        return found, reasons


def _reason_of(error: Exception) -> Reason:
    if isinstance(error, Problem):
        return Reason(error.code.replace("-", "_"), error.detail)
    if isinstance(error, TransferError | ChunkError):
        return Reason(error.code, str(error))
    if isinstance(error, EtcdError):
        return Reason("fleet_unavailable", f"etcd does not answer: {error}")
    if isinstance(error, OSError):
        return Reason("replica_failed", f"the copy can't be read or written: {error}")
    return Reason("replica_slow", f"it has taken longer than {_WHOLE_S:g} s")
