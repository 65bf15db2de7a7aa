"""Copies of guests that run: making them, where they lie, and when they go. `docs/explanation/snapshots.md` says why.

A checkpoint is a directory that got its name when it was whole. That of a fork lies in memory, as `fork-<id>`, and goes
once no copy has yet to go on from it; a snapshot is brought to the disk, as `snapshot-<id>`. While one is made its
directory is called `….new`. The row of a snapshot is there before its files, as they may take a while; the rows of a
fork's copies come after them, so none is told of whose files a killed daemon has not made. Whoever begins after such a
daemon knows what has an owner, and removes the rest.

A directory of a snapshot without a row stays and is listed, as the database may have been put back from a copy.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import trio

from actors import ActorDown, AskTimeout, Ref, Request
from volant.host import Host, inside
from volant.hypervisor import Checkpoint, CheckpointFailed, Hypervisor, MachineKind
from volant.journal import (
    DuplicateRequest,
    EventGap,
    FinishSnapshot,
    IdempotencyKey,
    Journal,
    RemoveSnapshot,
    Store,
    ask_journal,
)
from volant.model import FORK, SNAPSHOT, Problem, Snapshot, VmRow, is_copyable, waits_for

from .messages import CheckpointTaken

AT_ONCE = 2
"""So many checkpoints are under way at a time."""
CHECKPOINT_S = 60.0
RESERVE_MB = 256
"""What the host must have beside a copy of a guest's memory, in memory or on its disk."""
_COPY_S = 300.0
_COMMIT_S = 60.0
_CLEAR_S = 20.0
_UNDO_S = 10.0
_AGAIN_S = 1.0
_AGAIN_MAX_S = 60.0
MEMORY, STATE, LAYER, RECORD = "memory", "state", "root.qcow2", "capture.json"
_MAX_RECORD = 1024 * 1024
_MAX_STATE = 64 * 1024 * 1024
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_logger = logging.getLogger("volant.vm")

Take = Callable[[Path], Awaitable[CheckpointTaken]]
"""Copies the guest into an empty directory. Raises CheckpointFailed, Problem, ActorDown, AskTimeout."""
Commit = Callable[[str], Awaitable[tuple[VmRow, ...]]]
"""Makes the VMs that go on from the checkpoint of that name, which is whole. Raises Problem, DuplicateRequest."""


def checkpoint_at(memory_dir: Path, snapshot_dir: Path, checkpoint: str) -> Path:
    """Where a checkpoint lies, whether or not it is there."""
    return inside(snapshot_dir if checkpoint.startswith(SNAPSHOT) else memory_dir, checkpoint)


class CheckpointLost(Exception):
    """There is nothing to go on from. `code` is a stable word: `capture_failed`, `capture_gone`, `capture_damaged`,
    `capture_unfit`. The text is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CheckpointRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `capture.json` says."""

    version: int = 1
    kind: MachineKind
    """What it is of; see `Hypervisor.incompatibility`."""
    state_sha256: str
    fingerprints: dict[str, str]
    """By the names of the files: as they were when all of it was there."""
    paused_ms: float
    size_bytes: int
    """Room that it takes."""
    protocol: int = 1
    """The newest that the agent of its guest is known to speak."""


class ReadyCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint that may be used now."""

    layer: Path | None
    """To be copied."""
    paused_ms: float


@dataclass(eq=False)
class Turn:
    """One checkpoint that is to be made, or is being made."""

    vm: VmRow
    name: str
    done: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = None
    copies: tuple[VmRow, ...] = ()
    """Of a fork, once they are committed."""
    held: ExitStack = field(default_factory=ExitStack)
    """What is to be closed when it is over, whoever waits for that."""

    @property
    def id(self) -> str:
        return self.name.partition("-")[2]

    def fail(self, failure: Exception) -> None:
        self.failure = self.failure or failure

    async def over(self) -> None:
        """Wait for its end. Raises what it came to, if that is nothing."""
        await self.done.wait()
        if self.failure is not None:
            raise self.failure


class Checkpoints:
    """The checkpoints of one daemon."""

    def __init__(
        self,
        host: Host,
        store: Store,
        journal: Ref[Journal],
        hypervisor: Hypervisor,
        *,
        memory_dir: Path,
        snapshot_dir: Path,
    ) -> None:
        self._host = host
        self._store = store
        self._journal = journal
        self._hypervisor = hypervisor
        self._memory_dir = memory_dir
        self.snapshot_dir = snapshot_dir
        self._nursery: trio.Nursery | None = None
        self._turns: dict[str, Turn] = {}
        """By the names of the checkpoints."""
        self._known: dict[Path, CheckpointRecord] = {}
        """Those whose `state` has been read and was right."""

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make checkpoints, for ever, and remove what an earlier life has left. Raises OSError."""
        async with trio.open_nursery() as nursery:
            for path in self._left_behind():
                nursery.start_soon(self._clear, path)
            for name in self._names_in(self._memory_dir):
                if name.startswith(FORK) and not name.endswith(_NEW):
                    nursery.start_soon(self._remove_once_used, name)
            for snapshot in self._store.projection.snapshots.values():
                if snapshot.status == "creating":
                    _logger.warning("snapshot %s was not finished, and is removed", snapshot.name)
                    nursery.start_soon(self._undo, snapshot)
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def at(self, checkpoint: str) -> Path:
        """Where a checkpoint lies, whether or not it is there."""
        return checkpoint_at(self._memory_dir, self.snapshot_dir, checkpoint)

    def inspect(self) -> list[dict[str, object]]:
        """Those under way, ready for JSON."""
        return [{"capture": turn.name, "vm": turn.vm.name} for turn in self._turns.values()]

    def is_being_made(self, checkpoint: str) -> bool:
        """Whether it is under way in this daemon, and not what an earlier one has left."""
        return checkpoint in self._turns

    # Making them

    def enter(self, vm: VmRow, kind: str) -> Turn:
        """Have the turn of a checkpoint of `vm`, which ends with `leave`, or with what is started with it.

        :raises Problem: 503 too many are under way, or the host has no room for it.
        """
        if self._nursery is None:
            raise _busy("checkpoints are not made at present", vm)
        if any(turn.vm.id == vm.id for turn in self._turns.values()):
            raise _busy(f"VM {vm.name!r} is being copied already", vm)
        if len(self._turns) >= AT_ONCE:
            raise _busy(f"{len(self._turns)} VMs are being copied", vm)
        available = self._host.machine.file_room_mb(self._memory_dir)
        available -= sum(turn.vm.memory_mb for turn in self._turns.values())
        if available < vm.memory_mb + RESERVE_MB:
            raise Problem(
                503, "no-capacity",
                f"a copy of VM {vm.name!r} needs up to {vm.memory_mb} MiB of memory, and {max(0, available)} are left",
                vm=vm.name, hint="stop or delete a VM",
            )  # fmt: skip
        turn = Turn(vm, f"{kind}{self._host.random.new_id()[:12]}")
        self._turns[turn.name] = turn
        return turn

    def leave(self, turn: Turn) -> None:
        """It is over, or was never used."""
        self._turns.pop(turn.name, None)
        turn.held.close()
        turn.done.set()

    def start_fork(self, turn: Turn, take: Take, commit: Commit) -> None:
        """Make what copies go on from, then their rows, and remove it once they have gone on."""
        self._start(turn, partial(self._fork, turn, take, commit))

    def start_snapshot(self, turn: Turn, snapshot: Snapshot, take: Take, key: IdempotencyKey | None) -> None:
        """Make the files of a snapshot, whose row is committed, and commit that it is ready."""
        self._start(turn, partial(self._snapshot, turn, snapshot, take, key))

    def _start(self, turn: Turn, job: Callable[[], Awaitable[None]]) -> None:
        if self._nursery is None:
            turn.fail(CheckpointLost("capture_failed", "checkpoints are not made at present"))
            self.leave(turn)
            return
        self._nursery.start_soon(self._run, turn, job)

    async def _run(self, turn: Turn, job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except trio.Cancelled:
            turn.fail(CheckpointLost("capture_failed", "the daemon stopped before the copy was made"))
            raise
        finally:
            self.leave(turn)

    async def _fork(self, turn: Turn, take: Take, commit: Commit) -> None:
        path = self.at(turn.name)
        fresh = _fresh(path)
        unsure = False
        try:
            await self._write_record(fresh, await self._take(turn, take, fresh))
            await self._host.files.put_in_place(fresh, path)
            turn.copies = await commit(turn.name)
        except (CheckpointLost, DuplicateRequest, Problem, OSError) as error:
            lost = CheckpointLost("capture_failed", _unwritable(error)) if isinstance(error, OSError) else error
            _logger.warning("VM %s is not forked: %s", turn.vm.name, lost, extra={"vm": turn.vm.name})
            turn.fail(lost)
            unsure = isinstance(error, Problem) and error.status == 503
            await self._clear(fresh)
        finally:
            self.leave(turn)
        if unsure:
            # The journal may have kept the rows all the same, or does so yet.
            await trio.sleep(_COMMIT_S)
        await self._remove_once_used(turn.name)

    async def _snapshot(self, turn: Turn, snapshot: Snapshot, take: Take, key: IdempotencyKey | None) -> None:
        path = self.at(turn.name)
        passing, fresh = _fresh(self._memory_dir / turn.name), _fresh(path)
        try:
            taken = await self._take(turn, take, passing)
            checkpoint = taken.checkpoint
            size = checkpoint.memory_bytes + checkpoint.state_bytes + checkpoint.layer_bytes
            await self._host.files.mkdir(fresh)
            if self._host.disk.free(self.snapshot_dir) < size + RESERVE_MB * 2**20:
                raise CheckpointLost("capture_failed", f"the disk has no room for {size // 2**20} MiB more")
            for name in _names(checkpoint):
                await self._copy(passing / name, fresh / name)
            record = await self._write_record(fresh, taken)
            await self._host.files.put_in_place(fresh, path)
            await self._host.files.remove_tree(passing)
            await self._ask(FinishSnapshot(snapshot.name, snapshot.id, record.paused_ms, record.size_bytes, key))
        except (CheckpointLost, DuplicateRequest, Problem, OSError) as error:
            lost = CheckpointLost("capture_failed", _unwritable(error)) if isinstance(error, OSError) else error
            _logger.warning("VM %s has no snapshot %s: %s", turn.vm.name, snapshot.name, lost)
            turn.fail(lost)
            await self._clear(passing)
            with trio.move_on_after(_UNDO_S) as patience:
                await self._undo(snapshot)
            if patience.cancelled_caught:
                # Whoever asked need not wait for a journal that is down.
                self.leave(turn)
                await self._undo(snapshot)

    async def _take(self, turn: Turn, take: Take, into: Path) -> CheckpointTaken:
        """:raises CheckpointLost: :raises OSError:"""
        now = self._store.projection.by_id(turn.vm.id)
        if now is None or not is_copyable(now) or now.process != turn.vm.process:
            raise CheckpointLost("capture_failed", f"VM {turn.vm.name!r} has changed before it was copied")
        await self._host.files.mkdir(into)
        try:
            return await take(into)
        except CheckpointFailed as error:
            raise CheckpointLost("capture_failed", f"VM {turn.vm.name!r} was not copied: {error.message}") from error
        except Problem as error:
            raise CheckpointLost("capture_failed", error.detail) from error
        except (ActorDown, AskTimeout) as error:
            raise CheckpointLost("capture_failed", f"VM {turn.vm.name!r} was not copied: {error}") from error

    async def _copy(self, source: Path, target: Path) -> None:
        """Onto the disk, without pages of zeros, in a process of its own, as it is a lot to look at.

        :raises CheckpointLost: :raises OSError:
        """
        part = target.with_name(f"{target.name}.part")
        command = ["cp", "--sparse=always", "--", str(source), str(part)]
        try:
            status, said = await self._host.processes.run(
                command, env=_ENVIRONMENT, cwd=target.parent, timeout_s=_COPY_S
            )
        except trio.TooSlowError:
            raise CheckpointLost("capture_failed", f"the disk did not take the copy within {_COPY_S:g} s") from None
        if status != 0:
            raise CheckpointLost("capture_failed", f"the copy can't be written: {said.decode(errors='replace')[-300:]}")
        await self._host.files.put_in_place(part, target)

    async def _write_record(self, directory: Path, taken: CheckpointTaken) -> CheckpointRecord:
        checkpoint = taken.checkpoint
        host, names = self._host, _names(checkpoint)
        state = await host.files.read(directory / STATE, _MAX_STATE)
        record = CheckpointRecord(
            kind=checkpoint.kind,
            state_sha256=hashlib.sha256(state).hexdigest(),
            fingerprints={name: host.files.fingerprint(directory / name) for name in names},
            paused_ms=round(checkpoint.paused_s * 1000, 3),
            size_bytes=sum(host.disk.used(directory / name) for name in names),
            protocol=taken.protocol,
        )
        await host.files.write(directory / RECORD, msgspec.json.format(msgspec.json.encode(record)))
        return record

    # Using them

    async def find(self, checkpoint: str) -> ReadyCheckpoint:
        """A checkpoint that a VM is to go on from, checked just now.

        :raises CheckpointLost:
        """
        directory = self.at(checkpoint)
        what = "the snapshot" if checkpoint.startswith(SNAPSHOT) else "the copy of its original"
        if not self._host.files.exists(directory / RECORD):
            why = "its files are gone" if checkpoint.startswith(SNAPSHOT) else "it was not made, or is gone again"
            raise CheckpointLost("capture_gone", f"{what} can't be gone on from: {why}")
        try:
            record = msgspec.json.decode(
                await self._host.files.read(directory / RECORD, _MAX_RECORD), type=CheckpointRecord
            )
            for name, fingerprint in record.fingerprints.items():
                if self._host.files.fingerprint(directory / name) != fingerprint:
                    raise CheckpointLost("capture_damaged", f"{what} is damaged: somebody has touched its {name}")
            if directory not in self._known:
                state = await self._host.files.read(directory / STATE, _MAX_STATE)
                if hashlib.sha256(state).hexdigest() != record.state_sha256:
                    raise CheckpointLost("capture_damaged", f"{what} is damaged: its {STATE} has other bytes")
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointLost("capture_damaged", f"{what} is damaged: {error}") from error
        incompatibility = await self._hypervisor.incompatibility(record.kind)
        if incompatibility is not None:
            raise CheckpointLost("capture_unfit", f"{what} can't go on here: {incompatibility}")
        self._known[directory] = record
        return ReadyCheckpoint(directory / LAYER if LAYER in record.fingerprints else None, record.paused_ms)

    def protocol(self, checkpoint: str) -> int:
        """The newest protocol that the agents of its copies speak, as far as is known here: 1, the oldest, else."""
        record = self._known.get(self.at(checkpoint))
        return 1 if record is None else record.protocol

    # Removing them

    async def remove(self, snapshot: Snapshot) -> None:
        """Take a snapshot away; VMs that went on from it keep what they have.

        :raises Problem: 409 a VM has yet to go on from it; 503. :raises OSError: its files can't be removed.
        """
        host, path = self._host, self.at(snapshot.checkpoint)
        if not host.files.exists(path):
            await self._ask(RemoveSnapshot(snapshot.name, snapshot.id))
            return
        # So that whoever begins after a crash knows that the row has not merely been forgotten.
        await host.files.write(path / _REMOVED, b"")
        try:
            await self._ask(RemoveSnapshot(snapshot.name, snapshot.id))
        except Problem as problem:
            if problem.status == 409:
                await host.files.remove(path / _REMOVED)
            raise
        self._known.pop(path, None)
        await host.files.remove_tree(path)

    async def _remove_once_used(self, checkpoint: str) -> None:
        """Take what a fork went on from away once nobody waits for it. Those that run keep what they map."""
        store = self._store
        async with store.events.cursor(store.projection.last_event) as cursor:
            while any(waits_for(row, checkpoint) for row in store.projection.rows()):
                taken = await cursor.take()
                if not isinstance(taken, EventGap) and not taken:
                    return  # the daemon ends
        self._known.pop(self.at(checkpoint), None)
        await self._clear(self.at(checkpoint))

    async def _clear(self, path: Path) -> None:
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                await self._host.files.remove_tree(path)
        except OSError as error:
            _logger.error("what a copy of a VM has left can't be removed: %s", error)

    async def _undo(self, snapshot: Snapshot) -> None:
        """Remove the row of a snapshot that came to nothing, and then its files: again and again while the journal
        can't. One that it has kept as ready although nobody was told is one, and stays."""
        pause_s = _AGAIN_S
        while True:
            now = self._store.projection.snapshots.get(snapshot.name)
            if now is not None and now.id == snapshot.id and now.status == "ready":
                return
            try:
                await self._ask(RemoveSnapshot(snapshot.name, snapshot.id))
                break
            except Problem as problem:
                _logger.warning("snapshot %s is not removed yet: %s", snapshot.name, problem.detail)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _AGAIN_MAX_S)
        await self._clear(_fresh(self.at(snapshot.checkpoint)))
        await self._clear(self.at(snapshot.checkpoint))

    def _left_behind(self) -> list[Path]:
        """What nobody owns, of those that lie there now."""
        host, projection = self._host, self._store.projection
        owned = {snapshot.checkpoint for snapshot in projection.snapshots.values()}
        found = [
            self._memory_dir / name
            for name in self._names_in(self._memory_dir)
            if name.startswith(SNAPSHOT) or (name.startswith(FORK) and name.endswith(_NEW))
        ]
        for name in self._names_in(self.snapshot_dir):
            path = self.snapshot_dir / name
            if name in owned:
                # Whoever was about to remove it did not come to it.
                found.append(path / _REMOVED)
            elif name.endswith(_NEW) or host.files.exists(path / _REMOVED) or not host.files.exists(path / RECORD):
                found.append(path)
            else:
                _logger.warning("%s is a snapshot that the database does not know", path)
        return found

    def _names_in(self, directory: Path) -> list[str]:
        return self._host.files.names(directory) if self._host.files.exists(directory) else []

    async def _ask(self, message: Request[object]) -> None:
        """Has the journal do something. :raises Problem: as `ask_journal`. :raises DuplicateRequest:"""
        await ask_journal(self._journal, message)


_NEW = ".new"
_REMOVED = "removed"


def _fresh(path: Path) -> Path:
    return path.with_name(path.name + _NEW)


def _names(checkpoint: Checkpoint) -> list[str]:
    return [MEMORY, STATE, *([LAYER] if checkpoint.layer is not None else [])]


def _unwritable(error: OSError) -> str:
    return f"the copy can't be written: {error.strerror or error}"


def _busy(detail: str, vm: VmRow) -> Problem:
    return Problem(503, "captures-busy", detail, vm=vm.name, hint="try again in a moment")
