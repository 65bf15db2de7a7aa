"""The checkpoints on this host: their files and properties, and whether a VM can continue from one.

A checkpoint is a directory that is renamed when it is complete; before, its name is `….new`. The checkpoint of a fork
is in memory, as `fork-<id>`; the checkpoint of a snapshot is on the disk, as `snapshot-<id>`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import trio

from volant.host import CopyFailed, Host, copy_sparsely
from volant.hypervisor import Checkpoint, Hypervisor, MachineKind
from volant.model import FORK, SNAPSHOT
from volant.store import Damaged, Seal, SealedDirectories, fresh, is_fresh

from ._layout import LAYER, MEMORY, RECORD, STATE, checkpoint_at
from .messages import CheckpointTaken

_REMOVED = "removed"
_COPY_S = 300.0
_CLEAR_S = 20.0
_logger = logging.getLogger("volant.vm")


class CheckpointLost(Exception):
    """A checkpoint can't be used. The text is for people."""

    def __init__(self, code: str, message: str) -> None:
        """`code`: `checkpoint_failed`, `checkpoint_gone`, `checkpoint_damaged`, `checkpoint_unfit`."""
        super().__init__(message)
        self.code = code


class CheckpointRecord(Seal, frozen=True, kw_only=True):
    """The content of `checkpoint.json`."""

    kind: MachineKind | None
    """See `Hypervisor.incompatibility`. None for a checkpoint without memory and devices: at most the disk of a VM at
    rest."""
    paused_ms: float


class ReadyCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint from which a VM may continue now."""

    layer: Path | None
    """The layer, to be copied."""
    paused_ms: float


class CheckpointStore:
    """The checkpoints of one daemon."""

    def __init__(self, host: Host, hypervisor: Hypervisor, memory_dir: Path, snapshot_dir: Path) -> None:
        self.host = host
        self.hypervisor = hypervisor
        self.memory_dir = memory_dir
        self.snapshot_dir = snapshot_dir
        self._sealed = SealedDirectories(host, RECORD, STATE, CheckpointRecord)

    def at(self, checkpoint: str) -> Path:
        """Returns the directory of a checkpoint, whether or not it exists."""
        return checkpoint_at(self.memory_dir, self.snapshot_dir, checkpoint)

    def room_mb(self) -> int:
        """Returns the memory in MiB that is left for checkpoints."""
        return self.host.machine.file_room_mb(self.memory_dir)

    async def find(self, checkpoint: str) -> ReadyCheckpoint:
        """Returns a checkpoint from which a VM is to continue, after a check of its files. :raises CheckpointLost:"""
        record = await self.record(checkpoint)
        if record.kind is None:
            raise CheckpointLost("checkpoint_damaged", f"{_shown(checkpoint)} has no memory")
        incompatibility = await self.hypervisor.incompatibility(record.kind)
        if incompatibility is not None:
            raise CheckpointLost("checkpoint_unfit", f"{_shown(checkpoint)} can't go on here: {incompatibility}")
        layer = self.at(checkpoint) / LAYER if LAYER in record.fingerprints else None
        return ReadyCheckpoint(layer, record.paused_ms)

    async def record(self, checkpoint: str) -> CheckpointRecord:
        """Returns the properties of a checkpoint, after a check of its files. :raises CheckpointLost:"""
        directory, what = self.at(checkpoint), _shown(checkpoint)
        if not self._sealed.exists(directory):
            why = "its files are gone" if checkpoint.startswith(SNAPSHOT) else "it was not made, or is gone again"
            raise CheckpointLost("checkpoint_gone", f"the VM can't continue from {what}: {why}")
        try:
            return await self._sealed.check(directory)
        except Damaged as why:
            raise CheckpointLost("checkpoint_damaged", f"{what} is damaged: {why}") from why

    async def disk(self, checkpoint: str) -> Path:
        """Returns the disk in the checkpoint of a VM at rest, after a check. :raises CheckpointLost:"""
        await self.record(checkpoint)
        return self.at(checkpoint) / LAYER

    def protocol(self, checkpoint: str) -> int:
        """Returns the newest protocol that the agents of its copies are known to support; 1 while unknown."""
        record = self._sealed.known.get(self.at(checkpoint))
        return 1 if record is None else record.protocol

    # Making and removing them

    async def finish(self, checkpoint: str, taken: CheckpointTaken) -> CheckpointRecord:
        """Completes a fork's checkpoint, whose files are at `fresh`, with its record and its name. :raises OSError:"""
        path = self.at(checkpoint)
        record = await self._write_record(fresh(path), taken)
        await self.host.files.put_in_place(fresh(path), path)
        return record

    async def save(self, checkpoint: str, taken: CheckpointTaken) -> CheckpointRecord:
        """Copies a snapshot's checkpoint from memory, at `in_memory`, to the disk, where its volumes are.

        :raises CheckpointLost: the disk has no room, or fails.
        :raises OSError:
        """
        host, path, source = self.host, self.at(checkpoint), self.in_memory(checkpoint)
        volumes = taken.checkpoint.volumes
        size = taken.checkpoint.memory_bytes + taken.checkpoint.state_bytes + taken.checkpoint.layer_bytes
        await host.files.mkdir(fresh(path))
        self._check_room(size)
        for name in _names(taken.checkpoint):
            if name in volumes:
                # It is there, but not yet on the disk.
                await host.files.put_in_place(fresh(path) / name, fresh(path) / name)
            else:
                await self._copy(source / name, fresh(path) / name)
        record = await self._write_record(fresh(path), taken)
        await host.files.put_in_place(fresh(path), path)
        await host.files.remove_tree(source)
        return record

    async def save_disk(self, checkpoint: str, layer: Path | None) -> CheckpointRecord:
        """Makes the checkpoint of a VM at rest, on the disk. `layer` is its disk, which has no writer; None if it has
        no disk.

        :raises CheckpointLost: the disk has no room, or fails.
        :raises OSError:
        """
        host, path = self.host, self.at(checkpoint)
        await host.files.mkdir(fresh(path))
        if layer is not None:
            self._check_room(host.disk.used(layer))
            await self._copy(layer, fresh(path) / LAYER)
        record = await self._write(fresh(path), [LAYER] if layer is not None else [], None, 0.0, 1)
        await host.files.put_in_place(fresh(path), path)
        return record

    def _check_room(self, size: int) -> None:
        """:raises CheckpointLost:"""
        if self.host.disk.free(self.snapshot_dir) < size + RESERVE_MB * 2**20:
            raise CheckpointLost("checkpoint_failed", f"the disk has no room for {size // 2**20} MiB more")

    async def _copy(self, source: Path, target: Path) -> None:
        """:raises CheckpointLost: :raises OSError:"""
        try:
            await copy_sparsely(self.host, source, target, _COPY_S)
        except CopyFailed as error:
            raise CheckpointLost("checkpoint_failed", f"the copy can't be written: {error}") from error

    async def move_in(
        self,
        checkpoint: str,
        files: Path,
        names: Sequence[str],
        kind: MachineKind | None,
        paused_ms: float,
        protocol: int,
    ) -> CheckpointRecord:
        """Makes files from elsewhere the checkpoint of a snapshot. They are synced, in a directory next to the others.
        :raises OSError:"""
        record = await self._write(files, names, kind, paused_ms, protocol)
        await self.host.files.put_in_place(files, self.at(checkpoint))
        return record

    def in_memory(self, checkpoint: str) -> Path:
        """Returns the directory in which a checkpoint is taken. It is in memory, because disks are slow and the guest
        is paused meanwhile."""
        return fresh(self.memory_dir / checkpoint)

    async def volume_directory(self, checkpoint: str, needed_bytes: int) -> Path:
        """Returns the directory for copies of the volumes of a new snapshot. It is on the disk, as volumes may be
        large.

        :raises CheckpointLost: the disk has no room.
        :raises OSError:
        """
        path = fresh(self.at(checkpoint))
        await self.host.files.mkdir(path)
        if self.host.disk.free(path) < needed_bytes + RESERVE_MB * 2**20:
            raise CheckpointLost(
                "checkpoint_failed", f"the disk has no room for {needed_bytes // 2**20} MiB of volumes"
            )
        return path

    async def mark_removed(self, checkpoint: str) -> bool:
        """Marks a snapshot whose row is about to be removed, so that a daemon that finds it without a row removes it.
        Returns False if it has no files. :raises OSError:"""
        path = self.at(checkpoint)
        if not self.host.files.exists(path):
            return False
        await self.host.files.write(path / _REMOVED, b"")
        return True

    async def unmark(self, checkpoint: str) -> None:
        """Undoes `mark_removed`. :raises OSError:"""
        await self.host.files.remove(self.at(checkpoint) / _REMOVED)

    async def remove(self, checkpoint: str) -> None:
        """Removes the files of a checkpoint. VMs that run as its copies keep their mapped files. :raises OSError:"""
        path = self.at(checkpoint)
        self._sealed.known.pop(path, None)
        await self.host.files.remove_tree(path)

    async def clear(self, path: Path) -> None:
        """Removes a checkpoint, or a part of one, also when cancelled. Files that can't be removed are logged."""
        self._sealed.known.pop(path, None)
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                await self.host.files.remove_tree(path)
        except OSError as error:
            _logger.error("files of a copy of a VM can't be removed: %s", error)

    def forks(self) -> list[str]:
        """Returns the names of the complete checkpoints of forks."""
        return [name for name in self._names_in(self.memory_dir) if name.startswith(FORK) and not is_fresh(name)]

    def left_behind(self, owned: Collection[str]) -> list[Path]:
        """Returns the unfinished and half-removed checkpoints of an earlier daemon. `owned` are the checkpoints with a
        row. The directory of a snapshot without a row is kept, as the database may be a restored one."""
        found = [
            self.memory_dir / name
            for name in self._names_in(self.memory_dir)
            if name.startswith(SNAPSHOT) or (name.startswith(FORK) and is_fresh(name))
        ]
        for name in self._names_in(self.snapshot_dir):
            path = self.snapshot_dir / name
            if name.startswith(PULLED):
                if self.host.clock.now().timestamp() - self.host.files.changed_at(path) > PULLED_S:
                    found.append(path)
            elif name in owned:
                # The row outlived the daemon that was about to remove it.
                found.append(path / _REMOVED)
            elif is_fresh(name) or self.host.files.exists(path / _REMOVED) or not self._sealed.exists(path):
                found.append(path)
            else:
                _logger.warning("%s is a snapshot that the database does not know", path)
        return found

    def _names_in(self, directory: Path) -> list[str]:
        return self.host.files.names(directory) if self.host.files.exists(directory) else []

    async def _write_record(self, directory: Path, taken: CheckpointTaken) -> CheckpointRecord:
        checkpoint, paused_ms = taken.checkpoint, round(taken.checkpoint.paused_s * 1000, 3)
        return await self._write(directory, _names(checkpoint), checkpoint.kind, paused_ms, taken.protocol)

    async def _write(
        self, directory: Path, names: Sequence[str], kind: MachineKind | None, paused_ms: float, protocol: int
    ) -> CheckpointRecord:
        return await self._sealed.seal(directory, names, kind=kind, paused_ms=paused_ms, protocol=protocol)


PULLED = "pull-"
"""The prefix of the directory of a snapshot that is being pulled."""
PULLED_S = 86400.0
"""How long a partial pull is kept, so that another pull can continue it."""
RESERVE_MB = 256
"""Memory or disk space that stays free after a copy of a guest."""


def _shown(checkpoint: str) -> str:
    return "the snapshot" if checkpoint.startswith(SNAPSHOT) else "the copy of its original"


def _names(checkpoint: Checkpoint) -> list[str]:
    return [MEMORY, STATE, *([LAYER] if checkpoint.layer is not None else []), *checkpoint.volumes]
