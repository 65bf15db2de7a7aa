"""This host's end of a transfer: reads its snapshots to send them, and stores received ones.

It is independent of registries: it sends to a `Sink`, receives from a `Source`, and both ends agree on a
`SnapshotDocument`. Data of an interrupted transfer is kept in a directory named after the snapshot, and the next
transfer continues with it. It becomes a snapshot when its row follows its last file.
"""

from __future__ import annotations

import errno
import hashlib
import platform
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from volant.chunks import Assembly, ChunkReader, LocalChunks, Sink, Source, open_files, receive, send
from volant.host import Host
from volant.journal import IdempotencyKey, Store
from volant.model import Key, Problem, Snapshot, VmRow, copied_volumes, is_at_rest, no_such_snapshot
from volant.templates import template_at, template_layer
from volant.vm import PULLED, PULLED_S, RESERVE_MB, CheckpointLost, Copies
from volant.volumes import volume_path

from ._bases import BaseFiles
from ._document import LAYER, MEMORY, STATE, SnapshotDocument, document_of, file_names, own_names, snapshot_of
from ._transfer import Transfer, TransferError

_MAX_LEFT = 8
"""Maximum number of interrupted transfers whose files are kept."""
_LOCAL_BYTES = 8 * 1024**3
"""Maximum bytes of this host's snapshots and templates that are searched for chunks, which takes some seconds."""
_MAX_LOCAL = 16
_ID_DIGITS = 16
"""Digits of the id of a volume."""
_TEMPLATE = re.compile(r"[0-9a-f]{32}\Z")

Admit = Callable[[Snapshot], Awaitable[None]]
"""Decides whether the files in a snapshot's manifest may be named. Raises Problem."""


class Outgoing(NamedTuple):
    """A snapshot that is sent."""

    document: SnapshotDocument
    reader: ChunkReader
    snapshot: Snapshot

    async def send(self, sink: Sink, transfer: Transfer) -> None:
        """Sends the chunks that the other end lacks. :raises TransferError: `snapshot_damaged` :raises ChunkError:
        Raises the errors of the sink."""
        transfer.phase = "moving"
        with _damaged(self.snapshot):
            await send(self.reader, self.document.files, sink, transfer.progress)


class Incoming(NamedTuple):
    """A snapshot that is received."""

    document: SnapshotDocument
    digest: str
    """Identifies the snapshot, so that a later transfer of the same one continues with the data of this one."""
    source: str
    """The origin, for people."""
    project: str
    name: str | None
    """The new name; None for its former name."""
    auth: bytes | None = None
    """Credentials for registries, to fetch its base files."""
    moved: VmRow | None = None
    """The row of its VM if that moves to this host; another host of the fleet has sent it, which is trusted."""


class OwnSnapshots:
    """The snapshots of one daemon, for transfers."""

    def __init__(self, host: Host, store: Store, copies: Copies, bases: BaseFiles) -> None:
        self._host = host
        self._store = store
        self._copies = copies
        self._checkpoints = copies.checkpoints
        self._bases = bases
        self._directories: dict[Path, trio.Lock] = {}
        """The directories that a transfer fills, or waits for."""

    def find(self, key: Key) -> Snapshot:
        """Returns a snapshot that can be sent. :raises Problem: 404; 409, it is not ready."""
        snapshot = self._store.projection.snapshots.get(key)
        if snapshot is None or not snapshot.has_memory:
            raise no_such_snapshot(key.name)
        if snapshot.status != "ready":
            raise Problem(409, "snapshot-not-ready", f"snapshot {key.name!r} is being made", hint="try again later")
        return snapshot

    @asynccontextmanager
    async def sending(self, snapshot: Snapshot) -> AsyncIterator[Outgoing]:
        """Describes a snapshot, and holds its files open for the block, even if it is deleted in the meantime.

        :raises TransferError: `snapshot_damaged`, `snapshot_elsewhere`, `base_missing` :raises ChunkError: `too_large`
        """
        with ExitStack() as stack:
            with _damaged(snapshot):
                record = await self._checkpoints.record(snapshot.checkpoint)
                reader = stack.enter_context(open_files(self._files(snapshot)))
            bases = await self._bases.of(snapshot.vm)
            with _damaged(snapshot):
                files = await reader.describe(file_names(snapshot))
            document = document_of(snapshot, record.kind, record.protocol, bases, files)
            yield Outgoing(document, reader, snapshot)

    async def receive(
        self,
        incoming: Incoming,
        source: Source,
        admit: Admit,
        transfer: Transfer,
        *,
        key: IdempotencyKey | None = None,
    ) -> Snapshot:
        """Receives the missing parts of a snapshot, and stores it. The document was decoded, but not checked.

        :raises Problem: 409, the name is taken, or the quota is used up; 503; and the errors of `admit`
        :raises TransferError: `snapshot_unfit`, `snapshot_invalid`, `base_missing`, `base_mismatch`, `disk_full`,
            `transfer_failed` :raises ChunkError: `chunk_mismatch` :raises DuplicateRequest: Raises the errors of the
            source.
        """
        document = incoming.document
        snapshot = await self._check(incoming, admit)
        transfer.snapshot = snapshot.name
        async with self._directory(incoming) as directory:
            self._check_room(directory, document)
            transfer.phase = "moving"
            files = own_names(document, [path.name for path in self._files(snapshot)])
            local = LocalChunks(self._local_files(document, incoming.project), max_bytes=_LOCAL_BYTES)
            with _disk_errors(directory), Assembly(directory, files) as assembly:
                await receive(assembly, files, source, transfer.progress, local)
            transfer.phase = "finishing"
            return await self._copies.add_snapshot(
                snapshot, directory, [file.name for file in files.files], document.machine, document.protocol, key=key
            )

    async def _check(self, incoming: Incoming, admit: Admit) -> Snapshot:
        """Returns the row of a snapshot that this host can use, after a check of its base files."""
        document, project = incoming.document, incoming.project
        if document.architecture != platform.machine():
            raise TransferError(
                "snapshot_unfit",
                f"the snapshot was made on {document.architecture[:40]!r}, and this host is {platform.machine()}",
                "use a host of its architecture",
            )
        moves_at_rest = incoming.moved is not None and is_at_rest(incoming.moved)
        if (document.machine is None) != moves_at_rest:
            has = "has no memory" if document.machine is None else "has memory, and its VM is at rest"
            raise TransferError("snapshot_invalid", f"the snapshot {has}", "take another one")
        incompatibility = None
        if document.machine is not None:
            incompatibility = await self._checkpoints.hypervisor.incompatibility(document.machine)
        if incompatibility is not None:
            raise TransferError(
                "snapshot_unfit", f"the snapshot can't go on here: {incompatibility}", "use another host"
            )
        snapshot = snapshot_of(
            document,
            Key(project, incoming.name or document.name),
            self._host.random.new_id()[:12],
            # The same each time, so that a transfer which goes on finds its files.
            [_named(incoming, number)[:_ID_DIGITS] for number in range(len(document.vm.volumes))],
            incoming.source,
            self._host.clock.now(),
        )
        if incoming.moved is not None and incoming.moved.leaving is not None:
            snapshot = msgspec.structs.replace(snapshot, vm=incoming.moved, move=incoming.moved.leaving.id)
        self.check_free(snapshot.key)
        await admit(snapshot)
        await self._bases.obtain(document.vm.manifest, document.bases, project, incoming.auth)
        return snapshot

    def check_free(self, key: Key) -> None:
        """Checks a name before anything is fetched. :raises Problem: 409, the name is taken; 503, it is not known
        yet."""
        there = self._store.projection.snapshots.get(key)
        if there is not None and there.status != "ready":
            # 409 would be stored for the request's key; a daemon that was killed may have left this by the same one.
            raise Problem(
                503, "checkpoints-busy", f"snapshot {key.name!r} is being made, or removed", field="name",
                hint="try again in a moment", retry_after_s=1,
            )  # fmt: skip
        if there is not None:
            raise Problem(
                409, "snapshot-exists", f"there is a snapshot named {key.name!r} already", field="name",
                hint="choose another name, or delete that one first",
            )  # fmt: skip

    def _files(self, snapshot: Snapshot) -> list[Path]:
        """Returns the files of a snapshot, in the order of `file_names`."""
        directory = self._checkpoints.at(snapshot.checkpoint)
        if is_at_rest(snapshot.vm):
            return [directory / name for name in file_names(snapshot)]
        layer = [directory / LAYER] if snapshot.vm.layer else []
        volumes = [volume_path(directory, mount.id) for mount in copied_volumes(snapshot)]
        return [directory / MEMORY, directory / STATE, *layer, *volumes]

    def _local_files(self, document: SnapshotDocument, project: str) -> list[Path]:
        """Returns files of this host that may have chunks of a snapshot, the most promising first: those of its
        template, and of snapshots of the project. Files of other projects may be secret, and a digest does not prove
        that a client knows the content.
        """
        found = []
        template = document.vm.template
        if template is not None and _TEMPLATE.match(template):
            directory = self._bases.settings.template_dir
            found += [template_at(directory, template).memory, template_layer(directory, template)]

        def alike(other: Snapshot) -> tuple[bool, bool, bool, float]:
            vm = other.vm
            return (
                vm.memory_mb == document.vm.memory_mb,
                vm.name == document.vm.name,
                vm.template == template or vm.image == document.bases.boot_image,
                other.created_at.timestamp(),
            )

        own = [
            one for one in self._store.projection.snapshots.values() if one.project == project and one.status == "ready"
        ]
        for each in sorted(own, key=alike, reverse=True)[:_MAX_LOCAL]:
            found += self._files(each)
        return found

    @asynccontextmanager
    async def _directory(self, incoming: Incoming) -> AsyncIterator[Path]:
        """Yields the directory of a received snapshot, with the data of an earlier transfer, to one task at a time."""
        parent = self._bases.settings.snapshot_dir
        directory = parent / f"{PULLED}{_named(incoming)[:32]}"
        lock = self._directories.setdefault(directory, trio.Lock())
        try:
            async with lock:
                await self._clear(parent)
                await self._host.files.mkdir(directory)
                yield directory
        except OSError as error:
            raise TransferError(
                "transfer_failed", f"{directory} can't be written: {error.strerror or error}"
            ) from error
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._directories.pop(directory, None)

    async def _clear(self, parent: Path) -> None:
        """Removes the remains of transfers that ended long ago, and the oldest ones if there are many."""
        files, now = self._host.files, self._host.clock.now().timestamp()
        if not files.exists(parent):
            return
        left = [parent / name for name in files.names(parent) if name.startswith(PULLED)]
        idle = sorted((path for path in left if path not in self._directories), key=files.changed_at)
        surplus = len(idle) - _MAX_LEFT
        for number, path in enumerate(idle):
            if number < surplus or now - files.changed_at(path) > PULLED_S:
                await files.remove_tree(path)

    def _check_room(self, directory: Path, document: SnapshotDocument) -> None:
        needed = document.files.disk_bytes - self._host.disk.used(directory)
        if self._host.disk.free(directory) < needed + RESERVE_MB * 2**20:
            raise TransferError(
                "disk_full",
                f"the disk has no room for {needed // 2**20} MiB more",
                "delete snapshots that are not needed",
            )


def _named(incoming: Incoming, *more: object) -> str:
    """Returns hexadecimal digits that are the same for each transfer of one snapshot to one project."""
    return hashlib.sha256(repr((incoming.digest, incoming.project, *more)).encode()).hexdigest()


@contextmanager
def _damaged(snapshot: Snapshot) -> Iterator[None]:
    """Converts errors of reading. :raises TransferError: the files of a snapshot can't be read, or have changed."""
    try:
        yield
    except CheckpointLost as error:
        raise TransferError("snapshot_damaged", str(error), "delete it, and take another one") from error
    except OSError as error:
        raise TransferError(
            "snapshot_damaged", f"snapshot {snapshot.name!r} can't be read: {error.strerror or error}",
            "check the disk of the state directory",
        ) from error  # fmt: skip


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Converts errors of writing. :raises TransferError: the files can't be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise TransferError(
            "disk_full" if full else "transfer_failed", f"{directory} can't be written: {error.strerror or error}",
            "call again once that is solved: data that has arrived is kept",
        ) from error  # fmt: skip
