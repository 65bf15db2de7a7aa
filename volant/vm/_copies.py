"""Copies of guests: forks, which last until their copies run, and snapshots, which are kept.

The row of a snapshot is created before its files, as they may take a while. The rows of a fork's copies are created
after the checkpoint, so no client sees a copy that a killed daemon could not make. After a kill, the next daemon
removes every checkpoint that no row owns.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from actors import ActorDown, AskTimeout, Ref, Request
from volant.concurrency import Backoff
from volant.host import Host
from volant.hypervisor import CheckpointFailed, MachineKind
from volant.journal import (
    AddSnapshot,
    BeginSnapshot,
    DuplicateRequest,
    EventGap,
    FinishSnapshot,
    ForkRow,
    IdempotencyKey,
    Journal,
    Names,
    NotePush,
    RemoveSnapshot,
    RestoreRow,
    Store,
    ask_journal,
)
from volant.model import (
    FORK,
    SNAPSHOT,
    ForkVm,
    Key,
    Problem,
    RestoreVm,
    Snapshot,
    TakeSnapshot,
    VmRow,
    Volume,
    check_copyable,
    copied_volumes,
    current_cause,
    draining,
    fork_names,
    has_disk_to_move,
    is_at_rest,
    is_copyable,
    name_of_copy,
    name_taken,
    new_snapshot,
    no_such_snapshot,
    snapshot_name,
    waits_for,
)
from volant.store import fresh
from volant.volumes import Volumes, volume_path

from ._actors import VmActors
from ._capacity import Capacity, memory_need
from ._checkpoint_store import RESERVE_MB, CheckpointLost, CheckpointStore
from ._layout import VmSettings, root_disk
from .messages import CHECKPOINT_S, CheckpointTaken, TakeCheckpoint

R = TypeVar("R")
_AT_ONCE = 2
"""Maximum number of copies made at a time."""
_ASK_S = 60.0
_UNDO_S = 10.0
_RETRY_S, _RETRY_MAX_S = 1.0, 60.0
_logger = logging.getLogger("volant.vm")


class _Job(msgspec.Struct, eq=False):
    """One checkpoint that is being made."""

    vm: VmRow
    checkpoint: str
    done: trio.Event = msgspec.field(default_factory=trio.Event)
    failure: Exception | None = None
    copies: tuple[VmRow, ...] = ()
    """The rows of a fork's copies, after their commit."""
    reserved: ExitStack = msgspec.field(default_factory=ExitStack)
    """Room for the copies until the job is over, even if its client has disconnected."""

    @property
    def id(self) -> str:
        return self.checkpoint.partition("-")[2]

    def fail(self, failure: Exception) -> None:
        self.failure = self.failure or failure

    async def wait(self) -> None:
        """Waits for the end of the job. Raises its failure."""
        await self.done.wait()
        if self.failure is not None:
            raise self.failure


class Copies(msgspec.Struct):
    """Makes and removes copies of VMs, in its own tasks: a cancelled caller cancels nothing."""

    host: Host
    store: Store
    journal: Ref[Journal]
    checkpoints: CheckpointStore
    actors: VmActors
    capacity: Capacity
    volumes: Volumes
    names: Names
    snapshot_names: Names
    settings: VmSettings
    _nursery: trio.Nursery | None = None
    _jobs: dict[str, _Job] = msgspec.field(default_factory=dict)
    """The jobs, by the names of the checkpoints."""

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the jobs until cancelled, and removes the unfinished ones of an earlier daemon. :raises OSError:"""
        checkpoints, snapshots = self.checkpoints, self.store.projection.snapshots.values()
        async with trio.open_nursery() as nursery:
            for path in checkpoints.left_behind({snapshot.checkpoint for snapshot in snapshots}):
                nursery.start_soon(checkpoints.clear, path)
            for name in checkpoints.forks():
                nursery.start_soon(self._remove_once_used, name)
            for snapshot in snapshots:
                if snapshot.status == "creating":
                    _logger.warning("snapshot %s was not finished, and is removed", snapshot.name)
                    nursery.start_soon(self._undo, snapshot)
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def inspect(self) -> list[dict[str, object]]:
        """Returns the jobs, ready for JSON."""
        return [{"checkpoint": job.checkpoint, "vm": job.vm.name} for job in self._jobs.values()]

    # Requests

    async def fork(self, vm: Key, request: ForkVm, *, key: IdempotencyKey | None = None) -> tuple[VmRow, ...]:
        """Makes VMs that continue from the present state of this one, and returns their rows. The VM itself keeps
        running.

        :raises Problem: 400, the request; 404; 409, it is neither running nor paused, or a name is taken; 503, no
            capacity, it could not be copied, other VMs are being copied, or the daemon drains.
        :raises DuplicateRequest: the request was answered before.
        """
        row, projection = self.store.projection.require(vm), self.store.projection
        check_copyable(row)
        # Checked first, so that a request that will fail does not pause the guest.
        if projection.drain is not None:
            raise draining(projection.drain, vm=vm.name)
        for copy_name in request.names or ():
            if projection.get(Key(vm.project, copy_name)) is not None:
                raise name_taken(copy_name)
        request = self._with_names(row, request)
        copies = [Key(vm.project, copy_name) for copy_name in request.names or ()]

        async def commit(checkpoint: str, paused_ms: float) -> tuple[VmRow, ...]:
            async with self.names.claimed(copies):
                rows = await self._ask(ForkRow(row.id, request, checkpoint, key, paused_ms=paused_ms))
                for copy in rows:
                    await self.actors.get(copy)
                return rows

        with ExitStack() as stack:
            count = len(request.names or ()) or request.count or 1
            stack.enter_context(self.capacity.reserve(memory_need(row.memory_mb, clone=True), count))
            job = self._begin(row, FORK)
            job.reserved = stack.pop_all()
        self._start(job, partial(self._fork, job, commit))
        try:
            await job.wait()
        except CheckpointLost as error:
            raise Problem(503, "fork-failed", f"there is no fork: {error}", vm=vm.name, hint="try again") from error
        return job.copies

    def _with_names(self, row: VmRow, request: ForkVm) -> ForkVm:
        """Returns a request with the names of all copies if they must be claimed. Otherwise the journal chooses
        names."""
        elsewhere = self.names.elsewhere(row.project)
        if elsewhere is None or request.names is not None:
            return request
        here = [each.name for each in self.store.projection.rows() if each.project == row.project]
        return msgspec.structs.replace(request, count=None, names=fork_names(request, row.name, {*here, *elsewhere}))

    async def restore(self, request: RestoreVm, project: str, *, key: IdempotencyKey | None = None) -> VmRow:
        """Makes a VM that continues from a snapshot of its project; durable when this returns.

        :raises Problem: 400, the request; 404, no such snapshot; 409, the name is taken, or the snapshot is not ready;
            503, no capacity, or the daemon drains.
        :raises DuplicateRequest: the request was answered before.
        """
        snapshot = self.store.projection.snapshots.get(Key(project, request.from_snapshot))
        if snapshot is None:
            raise no_such_snapshot(request.from_snapshot, field="from_snapshot")
        if self.store.projection.get(Key(project, request.name)) is not None:
            raise name_taken(request.name)
        with self.capacity.reserve(memory_need(snapshot.vm.memory_mb, clone=True)):
            async with (
                self.names.claimed([Key(project, request.name)]),
                self._own_volumes(snapshot, request.name) as volumes,
            ):
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_S):
                    row = await self._ask(RestoreRow(request, project, key, volumes=volumes))
                    await self.actors.get(row)
                    return row
        raise Problem(503, "journal-slow", "the VM was not made in time; it may still appear", vm=request.name)

    @asynccontextmanager
    async def _own_volumes(self, snapshot: Snapshot, vm: str) -> AsyncIterator[dict[str, Volume]]:
        """Copies the volumes of a snapshot for one VM, and yields the copies by the ids of the originals.

        They become `ready` with the row of the VM, in one commit. Copies that are not `ready` at the end of the block
        are removed.

        :raises Problem: 409, a name is taken; 503, they can't be made.
        """
        made: dict[str, Volume] = {}
        try:
            for mount in copied_volumes(snapshot):
                source = volume_path(self.checkpoints.at(snapshot.checkpoint), mount.id)
                copy = Key(snapshot.project, name_of_copy(vm, mount.name))
                made[mount.id] = await self.volumes.begin_copy(copy, source)
            yield made
        finally:
            for volume in made.values():
                self.volumes.abandon(volume)

    async def take_snapshot(
        self, vm: Key, request: TakeSnapshot, *, key: IdempotencyKey | None = None, move: str = ""
    ) -> Snapshot:
        """Takes a snapshot of a VM, which is completely on the disk when this returns.

        :param move: the id of the move to another host for which it is taken; the VM may then be at rest
        :raises Problem: 400, the request; 404; 409, it is neither running nor paused, the name is taken, or it could
            not be copied; 503, no capacity, or other VMs are being copied.
        :raises DuplicateRequest: the request was answered before.
        """
        row = self.store.projection.require(vm)
        if not move or not is_at_rest(row):
            check_copyable(row, volumes=request.volumes)
        earlier = self.store.projection.snapshots.get(Key(vm.project, request.name or ""))
        if earlier is not None and earlier.status == "creating" and earlier.checkpoint not in self._jobs:
            # "The name is taken" would be stored for the request's key, though there is no such snapshot.
            raise _busy(f"the remains of snapshot {earlier.name!r}, which failed, are being removed", row)
        job = self._begin(row, SNAPSHOT)
        expected: Snapshot | None = None
        begun: Snapshot | None = None
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_S):
            try:
                name = request.name or snapshot_name(row, job.id, self.host.clock.now())
                named = msgspec.structs.replace(request, name=name)
                expected = new_snapshot(named, row, snapshot_id=job.id, now=self.host.clock.now(), move=move)
                async with self._claimed(expected):
                    begun = await self._ask(BeginSnapshot(row.id, named, job.id, move=move))
            except BaseException as error:
                self._end(job)
                is_refused = isinstance(error, Problem) and error.status < 500
                if expected is not None and not is_refused:
                    # The journal may have made the row all the same, or may do so yet.
                    self._undo_soon(expected)
                raise
            self._start(job, partial(self._snapshot, job, begun, key))
        if begun is None:
            raise Problem(503, "journal-slow", "the snapshot was not begun in time", vm=vm.name, hint="try again")
        try:
            await job.wait()
        except CheckpointLost as error:
            raise Problem(503, "snapshot-failed", f"there is no snapshot: {error}", vm=vm.name) from error
        snapshot = self.store.projection.snapshots.get(begun.key)
        if snapshot is None or snapshot.id != begun.id:
            raise no_such_snapshot(begun.name)
        return snapshot

    async def add_snapshot(
        self,
        snapshot: Snapshot,
        files: Path,
        names: Sequence[str],
        kind: MachineKind | None,
        protocol: int,
        *,
        key: IdempotencyKey | None = None,
    ) -> Snapshot:
        """Stores a snapshot from another host. Its files are on the disk, in a directory next to those of the others. A
        cancelled caller cancels nothing.

        :param names: the names of its files, those of a checkpoint
        :raises Problem: 404, the project is gone; 409, the name is taken, or the quota is used up; 503.
        :raises DuplicateRequest: the request was answered before.
        """
        is_kept = False
        paused_ms = snapshot.paused_ms or 0.0
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_S):
            try:
                async with self._claimed(snapshot):
                    await self._ask(AddSnapshot(snapshot))
                record = await self.checkpoints.move_in(snapshot.checkpoint, files, names, kind, paused_ms, protocol)
                kept = await self._ask(FinishSnapshot(snapshot.key, snapshot.id, paused_ms, record.size_bytes, key))
                is_kept = True
                return kept
            except OSError as error:
                raise Problem(503, "snapshot-failed", f"its files can't be put in place: {error}") from error
            finally:
                if not is_kept:
                    self._undo_soon(snapshot)
        raise Problem(503, "journal-slow", "the snapshot was not kept in time; it may still appear", hint="try again")

    async def note_push(self, snapshot: Snapshot, reference: str) -> None:
        """Reports that a snapshot is in a registry. :raises Problem: 503"""
        await self._ask(NotePush(snapshot.key, snapshot.id, reference))

    async def remove_snapshot(self, key: Key, *, move: str = "") -> None:
        """Removes a snapshot. VMs made from it keep their data.

        :param move: the id of the completed move to another host for which it was made
        :raises Problem: 404; 409, a VM has yet to continue from it, or it is being made, or is for a move; 503.
        """
        snapshot = self.store.projection.snapshots.get(key)
        if snapshot is None:
            raise no_such_snapshot(key.name)
        if snapshot.move != move:
            for_what = "a replica of" if snapshot.is_replica else "what moves with"
            raise Problem(
                409, "snapshot-of-move", f"snapshot {key.name!r} is {for_what} VM {snapshot.vm.name!r}",
                hint="it is removed by itself when it is not needed any more",
            )  # fmt: skip
        if snapshot.status != "ready":
            raise Problem(
                409, "snapshot-not-ready", f"snapshot {key.name!r} is being made", hint="try again once it is `ready`"
            )  # fmt: skip
        checkpoint = snapshot.checkpoint
        try:
            has_files = await self.checkpoints.mark_removed(checkpoint)
            try:
                await self._ask(RemoveSnapshot(snapshot.key, snapshot.id))
            except Problem as problem:
                if has_files and problem.status == 409:
                    await self.checkpoints.unmark(checkpoint)
                raise
            if has_files:
                await self.checkpoints.remove(checkpoint)
        except OSError as error:
            raise Problem(503, "snapshot-not-removed", f"files of the snapshot can't be removed: {error}") from error
        await self._free(snapshot)

    # Jobs

    def _claimed(self, snapshot: Snapshot) -> AbstractAsyncContextManager[None]:
        """Claims the name of a snapshot for a block. A replica needs no claim, as no client uses its name."""
        return nullcontext() if snapshot.is_replica else self.snapshot_names.claimed([snapshot.key])

    async def _free(self, snapshot: Snapshot) -> None:
        if not snapshot.is_replica:
            await self.snapshot_names.free(snapshot.key)

    def _begin(self, vm: VmRow, kind: str) -> _Job:
        """Begins a job, which ends with `_end`. :raises Problem: 503, there are too many jobs, or too little memory."""
        if self._nursery is None:
            raise _busy("no copies are made at present", vm)
        if any(job.vm.id == vm.id for job in self._jobs.values()):
            raise _busy(f"VM {vm.name!r} is being copied already", vm)
        if len(self._jobs) >= _AT_ONCE:
            raise _busy(f"{len(self._jobs)} VMs are being copied", vm)
        available_mb = self.checkpoints.room_mb() - sum(job.vm.memory_mb for job in self._jobs.values())
        if available_mb < vm.memory_mb + RESERVE_MB and not is_at_rest(vm):
            raise Problem(
                503, "no-capacity",
                f"a copy of VM {vm.name!r} needs up to {vm.memory_mb} MiB of memory, {max(0, available_mb)} are left",
                vm=vm.name, hint="stop or delete a VM",
            )  # fmt: skip
        job = _Job(vm, f"{kind}{self.host.random.new_id()[:12]}")
        self._jobs[job.checkpoint] = job
        return job

    def _end(self, job: _Job) -> None:
        self._jobs.pop(job.checkpoint, None)
        job.reserved.close()
        job.done.set()

    def _start(self, job: _Job, work: Callable[[], Awaitable[None]]) -> None:
        if self._nursery is None:
            job.fail(CheckpointLost("checkpoint_failed", "no copies are made at present"))
            self._end(job)
            return
        self._nursery.start_soon(self._run, job, work)

    async def _run(self, job: _Job, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except trio.Cancelled:
            job.fail(CheckpointLost("checkpoint_failed", "the daemon stopped before the copy was made"))
            raise
        finally:
            self._end(job)

    async def _fork(self, job: _Job, commit: Callable[[str, float], Awaitable[tuple[VmRow, ...]]]) -> None:
        """Makes the checkpoint, then the rows, and removes the checkpoint once all copies run."""
        path = self.checkpoints.in_memory(job.checkpoint)
        unsure = False
        try:
            record = await self.checkpoints.finish(job.checkpoint, await self._take(job, path, None))
            job.copies = await commit(job.checkpoint, record.paused_ms)
        except (CheckpointLost, DuplicateRequest, Problem, OSError) as error:
            failure = _failure(error)
            _logger.warning("VM %s is not forked: %s", job.vm.name, failure, extra={"vm": job.vm.name})
            job.fail(failure)
            unsure = isinstance(error, Problem) and error.status == 503
            await self.checkpoints.clear(path)
        finally:
            self._end(job)
        if unsure:
            # The journal may have kept the rows all the same, or may do so yet.
            await trio.sleep(_ASK_S)
        await self._remove_once_used(job.checkpoint)

    async def _snapshot(self, job: _Job, snapshot: Snapshot, key: IdempotencyKey | None) -> None:
        """Makes the files of a snapshot whose row is committed, and commits that it is ready."""
        path = self.checkpoints.in_memory(job.checkpoint)
        try:
            if is_at_rest(snapshot.vm):
                record = await self.checkpoints.save_disk(job.checkpoint, await self._disk_at_rest(snapshot.vm))
            else:
                volumes = await self._volume_directory(job, snapshot)
                record = await self.checkpoints.save(job.checkpoint, await self._take(job, path, volumes))
            await self._ask(FinishSnapshot(snapshot.key, snapshot.id, record.paused_ms, record.size_bytes, key))
        except (CheckpointLost, DuplicateRequest, Problem, OSError) as error:
            failure = _failure(error)
            _logger.warning("VM %s has no snapshot %s: %s", job.vm.name, snapshot.name, failure)
            job.fail(failure)
            await self.checkpoints.clear(path)
            with trio.move_on_after(_UNDO_S) as scope:
                await self._undo(snapshot)
            if scope.cancelled_caught:
                # The caller need not wait for a journal that is down.
                self._end(job)
                await self._undo(snapshot)

    async def _volume_directory(self, job: _Job, snapshot: Snapshot) -> Path | None:
        """Returns the directory for copies of volumes; None if the VM writes to none. :raises CheckpointLost,
        OSError:"""
        written = {mount.id for mount in copied_volumes(snapshot)}
        if not written:
            return None
        files, all_volumes = self.volumes.files, self.store.projection.volumes.values()
        used = [files.used(volume) or 0 for volume in all_volumes if volume.id in written]
        return await self.checkpoints.volume_directory(job.checkpoint, sum(used))

    async def _disk_at_rest(self, vm: VmRow) -> Path | None:
        """Returns the disk of a VM at rest, which can't start while it is being moved. :raises CheckpointLost: the disk
        does not exist."""
        if not has_disk_to_move(vm):
            return None
        if vm.disk_from is not None:
            return await self.checkpoints.disk(vm.disk_from)
        disk = root_disk(self.settings, vm)
        if disk is None or not self.host.files.exists(disk.layer):
            raise CheckpointLost("checkpoint_failed", f"the disk of VM {vm.name!r} is gone")
        return disk.layer

    async def _take(self, job: _Job, into: Path, volumes: Path | None) -> CheckpointTaken:
        """Requests the copy of the guest from the VM's actor. :raises CheckpointLost: :raises OSError:"""
        now = self.store.projection.by_id(job.vm.id)
        if now is None or not is_copyable(now) or now.process != job.vm.process:
            raise CheckpointLost("checkpoint_failed", f"VM {job.vm.name!r} has changed before it was copied")
        await self.host.files.mkdir(into)
        try:
            ref = await self.actors.get(job.vm)
            return await ref.ask(TakeCheckpoint(into, volumes), timeout_s=3 * CHECKPOINT_S)
        except CheckpointFailed as error:
            raise CheckpointLost("checkpoint_failed", f"VM {job.vm.name!r} was not copied: {error.message}") from error
        except Problem as error:
            raise CheckpointLost("checkpoint_failed", error.detail) from error
        except (ActorDown, AskTimeout) as error:
            raise CheckpointLost("checkpoint_failed", f"VM {job.vm.name!r} was not copied: {error}") from error

    async def _remove_once_used(self, checkpoint: str) -> None:
        """Removes a fork's checkpoint once no VM has yet to continue from it. Running copies keep their mapped
        files."""
        store = self.store
        async with store.events.cursor(store.projection.last_event) as cursor:
            while any(waits_for(row, checkpoint) for row in store.projection.rows()):
                taken = await cursor.take()
                if not isinstance(taken, EventGap) and not taken:
                    return  # the daemon ends
        await self.checkpoints.clear(self.checkpoints.at(checkpoint))

    def _undo_soon(self, snapshot: Snapshot) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._undo, snapshot)

    async def _undo(self, snapshot: Snapshot) -> None:
        """Removes the row of a failed snapshot, and then its files; retries while the journal can't. A snapshot that
        the journal stored as ready, without a confirmation, is kept."""
        # It undoes a request, and is none: its record must not say that the request was done.
        current_cause.set(None)
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            now = self.store.projection.snapshots.get(snapshot.key)
            if now is not None and now.id == snapshot.id and now.status == "ready":
                return
            try:
                await self._ask(RemoveSnapshot(snapshot.key, snapshot.id))
                break
            except Problem as problem:
                _logger.warning("snapshot %s is not removed yet: %s", snapshot.name, problem.detail)
            await backoff.pause()
        await self._free(snapshot)
        path = self.checkpoints.at(snapshot.checkpoint)
        await self.checkpoints.clear(fresh(path))
        await self.checkpoints.clear(path)

    async def _ask(self, message: Request[R]) -> R:
        return await ask_journal(self.journal, message)


def _failure(error: Exception) -> Exception:
    if isinstance(error, OSError):
        return CheckpointLost("checkpoint_failed", f"the copy can't be written: {error.strerror or error}")
    return error


def _busy(detail: str, vm: VmRow) -> Problem:
    return Problem(503, "checkpoints-busy", detail, vm=vm.name, hint="try again in a moment")
