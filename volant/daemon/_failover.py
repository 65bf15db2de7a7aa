"""The daemon's part in a failover: it holds back this host's movable VMs, and starts those of lost hosts.

`volant.fleet` decides when; this module acts, with the freezable group of processes and the VMs of this host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial

import msgspec
import trio

from actors import Ref
from volant.concurrency import Backoff
from volant.fleet import (
    PAUSE_AFTER,
    Claim,
    EtcdError,
    Fence,
    Fleet,
    NameTaken,
    Vms,
    Wanted,
    key_of,
    obstacle_on,
    pause_at,
    text_of,
    unavailable,
)
from volant.host import Freezer, FreezerFailed, Host, ResourceLimits
from volant.journal import CommitSteps, Journal, StaleRow, Store, ask_journal
from volant.model import (
    CreateVm,
    Desired,
    Key,
    Left,
    Manifest,
    Movable,
    Move,
    Placement,
    Problem,
    ProcessIdentity,
    Step,
    VmRow,
    parse_ttl,
)
from volant.vm import DELETED, FenceFailed, Lifecycle, VmFence

from ._arrivals import Arrivals

_CLOSE_S = 8.0
_DISCARD_S = 60.0
_OPEN_AGAIN_S = 30.0
_STOPPED_AGAIN_S = 0.5
_LOOK_AGAIN_S = 0.02
_FREEZE_S, _FREEZE_MAX_S = 0.1, 2.0
_REMEMBERED = 10_000
"""Maximum remembered VMs that other hosts have taken over: a host has fewer at once, and a DELETE of one that was just
removed may wait."""
_logger = logging.getLogger("volant.fleet")


class Failover(VmFence, Vms):
    """The movable VMs of this host.

    :param host_name: this host's name in the fleet
    :param vms, fleet: return the parts of the daemon that are created later
    """

    def __init__(
        self,
        host: Host,
        store: Store,
        freezer: Freezer,
        host_name: str,
        journal: Ref[Journal],
        arrivals: Arrivals,
        *,
        ttl_s: float,
        vms: Callable[[], Lifecycle],
        fleet: Callable[[], Fleet],
    ) -> None:
        self._host = host
        self._store = store
        self._freezer = freezer
        self._name = host_name
        self._journal = journal
        self._arrivals = arrivals
        self._ttl_s = ttl_s
        self._vms = vms
        self._fleet = fleet
        self.obstacle: str | None = "the daemon starts"
        self._ready = trio.Event()
        """Set once there is no obstacle."""
        self._keeping: trio.CancelScope | None = None
        self._discarded: dict[tuple[str, int], None] = {}
        """The ids and epochs of VMs that were removed because they belong to another host, newest last."""

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the watchdog, until cancelled."""
        await self._open()
        task_status.started()
        if not self._ready.is_set():
            while not self._ready.is_set():
                await trio.sleep(_OPEN_AGAIN_S)
                await self._open()
            # VMs that were found are frozen, until etcd was asked for them.
            self._fleet().lapse()
        try:
            with trio.CancelScope() as self._keeping:
                await self._watch()
            # The supervisor restarts a child that ends.
            await trio.sleep_forever()
        finally:
            if not self._rows():
                with trio.move_on_after(_CLOSE_S, shield=True):
                    await self._close()

    async def _watch(self) -> None:
        """Keeps the watchdog, and detects when it was late and has frozen resumed VMs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._freezer.keep)
            while True:
                await self._freezer.stopped()
                self._fleet().lapse()
                await trio.sleep(_STOPPED_AGAIN_S)

    async def _close(self) -> None:
        """Removes the group and the watchdog, as they are not needed."""
        try:
            await self._freezer.close()
        except FreezerFailed as error:
            _logger.warning("%s", error)

    async def _open(self) -> None:
        before = self.obstacle
        try:
            await self._freezer.open()
            self.obstacle = None
            self._ready.set()
        except FreezerFailed as error:
            self.obstacle = str(error)
            if before != self.obstacle:
                _logger.warning("no VM of this host can be movable: %s", error)

    @property
    def until(self) -> float | None:
        """Returns the expiry of this host's sign of life, as the last daemon knew it; None if unknown."""
        if self.obstacle is not None or not self._freezer.until:
            return None
        return self._freezer.until + (1 - PAUSE_AFTER) * self._ttl_s

    def lasts(self, until: float) -> None:
        """Passes the time until which VMs may run to the watchdog."""
        if self.obstacle is None:
            self._freezer.last(pause_at(until, self._ttl_s))

    async def release(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        if self.obstacle is None:
            await self._close()
        for row in self._rows():
            await self._keep_here(row)

    async def _keep_here(self, row: VmRow) -> None:
        """Makes a VM one that no other host starts."""
        text = "this host has left its fleet, so no other host starts the VM any more"
        current: VmRow | None = row
        while current is not None and current.movable is not None:
            here = msgspec.structs.replace(current, movable=None)
            try:
                await ask_journal(self._journal, CommitSteps(row.id, current.revision, (Step(here, text),)))
            except StaleRow:
                pass
            current = self._store.projection.by_id(row.id)

    def _rows(self) -> list[VmRow]:
        return [row for row in self._store.projection.rows() if row.movable is not None]

    # For VMs

    @property
    def is_open(self) -> bool:
        return self._fleet().left or (self.obstacle is None and self._fence.is_open)

    @property
    def times_closed(self) -> int:
        return self._fence.times_closed

    @property
    def _fence(self) -> Fence:
        fence = self._fleet().fence
        assert fence is not None
        return fence

    async def opened(self) -> None:
        while not self.is_open:
            await self._ready.wait()
            await self._fence.opened()
            await trio.sleep(_LOOK_AGAIN_S)

    async def closed(self) -> None:
        if self._fleet().left:
            await trio.sleep_forever()
        await self._fence.closed()

    def movable(self, request: CreateVm, manifest: Manifest | None) -> Movable:
        if self.obstacle is not None:
            raise Problem(
                503, "failover-unavailable", f"this host can't hold VMs back: {self.obstacle}", field="failover",
                hint="leave `failover` out, or choose another host",
            )  # fmt: skip
        if not self.is_open:
            raise unavailable("this host has not heard from etcd for too long")
        ttl = parse_ttl(request.ttl)
        return Movable(
            id=self._host.random.new_id(),
            request=request,
            manifest=manifest,
            expires_at=None if ttl is None else self._host.clock.now() + ttl,
        )

    async def enclose(self, row: VmRow, identity: ProcessIdentity, limits: ResourceLimits) -> None:
        try:
            await self._freezer.enclose(identity, f"VM {row.name}", limits)
        except FreezerFailed as error:
            raise FenceFailed(str(error)) from error
        if row.movable is None or self._fleet().left:
            return
        # The fence has not asked for a VM that was made while it asked: its host may have been away since its claim.
        while True:
            try:
                found = await self._fleet().claims.get(text_of(row.key))
                break
            except EtcdError as error:
                # Etcd may choose a leader. The fence closes if that takes long, and a launch has a deadline.
                if not self.is_open:
                    raise FenceFailed(f"etcd does not say whose VM it is: {error}") from error
                await trio.sleep(_STOPPED_AGAIN_S)
        if found is None or not found.is_of(self._claim(row, row.movable)):
            self._fleet().lapse()
            raise FenceFailed("etcd has another owner for the VM; this host asks again for all that may move")

    async def withdraw(self, row: VmRow) -> None:
        if self._fleet().left or row.leaving is not None:
            # One that leaves ends here once it is another host's.
            return
        if row.movable is None:
            await self._settle(row)
            return
        try:
            await self._fleet().claims.withdraw(text_of(row.key), self._claim(row, row.movable))
        except NameTaken:
            if not self._is_discarded(row.movable):
                raise _moving(row, f"another host may have taken VM {row.name!r} over, and is asked") from None
        except EtcdError as error:
            raise unavailable(error) from error

    def check_deleted(self, row: VmRow) -> None:
        if row.leaving is not None or (row.movable is not None and self._is_discarded(row.movable)):
            raise _moving(row, f"another host has taken VM {row.name!r} over before it was deleted here")

    def _is_discarded(self, movable: Movable) -> bool:
        return (movable.id, movable.epoch) in self._discarded

    async def _settle(self, row: VmRow) -> None:
        """Records that a VM that moved here has arrived, before it is deleted. Otherwise it would be started again.

        :raises Problem: 503
        """
        claims, name = self._fleet().claims, text_of(row.key)
        try:
            claim = await claims.get(name)
            if claim is not None and claim.owner == self._name and claim.taking:
                await claims.settle(name, claim)
        except (EtcdError, NameTaken) as error:
            raise unavailable(str(error)) from error

    # For the fleet

    @property
    def held(self) -> Mapping[str, Claim]:
        return {text_of(row.key): self._claim(row, row.movable) for row in self._rows() if row.movable is not None}

    @property
    def undecided(self) -> Collection[str]:
        return {text_of(row.key) for row in self._rows() if row.leaving is not None and row.leaving.deciding}

    def _claim(self, row: VmRow, movable: Movable) -> Claim:
        # One that is being deleted is not claimed for others again.
        failover = "never" if row.desired is Desired.DELETED else movable.request.failover
        return Claim(movable.id, self._name, movable.epoch, failover)

    def _movable_of(self, vm: Key) -> Movable | None:
        """Returns the data for a start of a VM by another host; None if none starts it."""
        row = self._store.projection.get(vm)
        return None if row is None else row.movable

    def spec(self, name: str) -> bytes:
        movable = self._movable_of(key_of(name))
        return b"" if movable is None else msgspec.json.encode(movable)

    async def pause_all(self) -> None:
        backoff = Backoff(_FREEZE_S, _FREEZE_MAX_S)
        while self.obstacle is None:
            try:
                await self._freezer.freeze()
                return
            except FreezerFailed as error:
                _logger.error("movable VMs may run on two hosts: %s", error)
            await backoff.pause()

    async def resume_all(self) -> bool:
        if self.obstacle is not None:
            return not self._rows()
        try:
            # A database that was put back may lack VMs that run, and that others have by now.
            await self._freezer.thaw({row.tag for row in self._store.projection.rows() if row.tag})
        except FreezerFailed as error:
            _logger.warning("movable VMs stay paused: %s", error)
            return False
        return True

    async def has_room(self, name: str, spec: bytes, snapshot: str = "") -> bool:
        try:
            wanted = msgspec.json.decode(spec, type=Movable)
        except (msgspec.MsgspecError, ValueError):
            return False
        known = self._fleet().last_known(key_of(name))
        if known is not None and known.desired in (Desired.STOPPED, Desired.DELETED):
            # There is nothing to go on with elsewhere.
            return False
        if self.obstacle is not None or self._store.projection.drain is not None:
            return False
        if snapshot and Key(key_of(name).project, snapshot) not in self._store.projection.snapshots:
            # Its disk was put back, say. Another host may have the same replica.
            return False
        need = Wanted(
            memory_mb=known.memory_mb if known is not None else wanted.request.memory_mb or 0,
            placement=wanted.request.placement or Placement(),
        )
        fleet, load = self._fleet(), self._vms().load()
        try:
            here = msgspec.structs.replace(fleet.get(self._name), free_memory_mb=load.free_memory_mb)
        except Problem:
            return False
        return obstacle_on(here, need, partial(fleet.labels_on, project=key_of(name).project)) is None

    async def start(self, name: str, claim: Claim, spec: bytes) -> None:
        key = key_of(name)
        if claim.snapshot:
            await self._arrivals.start(key, claim.snapshot, claim.epoch)
            return
        there = self._movable_of(key)
        if there is not None and (there.id, there.epoch) == (claim.vm, claim.epoch):
            return
        try:
            movable = msgspec.json.decode(spec, type=Movable)
        except (msgspec.MsgspecError, ValueError) as error:
            raise Problem(503, "spec-unreadable", f"another version has written what the VM is: {error}") from None
        move = Move(claim.before, self._name, self._host.clock.now(), "taken_over")
        movable = msgspec.structs.replace(movable, id=claim.vm, epoch=claim.epoch, move=move)
        await self._vms().create(movable.request, key.project, manifest=movable.manifest, taken_over=movable)

    async def discard(self, name: str, claim: Claim) -> None:
        row = self._store.projection.get(key_of(name))
        if row is None or row.movable is None or row.movable.id != claim.vm:
            return
        self._discarded[claim.vm, row.movable.epoch] = None
        if len(self._discarded) > _REMEMBERED:
            del self._discarded[next(iter(self._discarded))]
        _logger.warning("VM %s: another host has taken it over, so it ends here", row.name, extra={"vm": row.name})
        await self._vms().move(row, Left("another host"))
        _, after = await self._vms().wait(row.id, {DELETED}, _DISCARD_S)
        if after is not None:
            raise Problem(503, "delete-slow", f"VM {row.name!r} is not gone after {_DISCARD_S:g} s", vm=row.name)


def _moving(row: VmRow, detail: str) -> Problem:
    return Problem(503, "vm-moving", detail, vm=row.name, hint="try again", retry_after_s=2)
