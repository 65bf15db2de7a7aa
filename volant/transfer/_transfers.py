"""The transfers of one daemon: snapshots sent to registries and received from them.

A transfer ends when its caller is cancelled. The data that has arrived is kept for the next attempt, in a registry as
blobs without a manifest. A manifest follows its last chunk.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import trio

from volant import oci
from volant.chunks import Source, Throttle
from volant.concurrency import NoPlace, Places
from volant.host import Host
from volant.journal import IdempotencyKey, Store
from volant.model import Key, RegistrySnapshot, Snapshot, TransferView, VmRow, check_name, invalid
from volant.oci import OciError
from volant.vm import Copies

from ._bases import BaseFiles, registries
from ._document import Bases, decode, encode
from ._own_snapshots import Admit, Incoming, Outgoing, OwnSnapshots
from ._transfer import Transfer, TransferError

if TYPE_CHECKING:
    from volant.oci import Reference, Repository

_AT_ONCE = 2
_MAX_TRANSFERS = 32
"""Maximum running and waiting transfers."""
_OF_ONE = 16
"""Maximum per project."""
_MAX_AUTH_BYTES = 1024 * 1024
_logger = logging.getLogger("volant.transfer")


class TransferSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's settings for transfers."""

    bytes_per_s: float | None = None
    """Maximum rate of all transfers together; None for no limit."""
    max_bytes: int = 64 * 1024**3
    """Maximum size of the files of a pulled snapshot."""
    timeout_s: float = 6 * 3600.0
    """Maximum time for one transfer."""
    stalled_s: float = 60.0
    plain_http: frozenset[str] = frozenset()
    certificates: Path | None = None
    auth_file: Path | None = None
    """The auth file for clients that send no credentials."""
    environment: dict[str, str] = {}
    """The environment variables for proxies."""


class Client(msgspec.Struct, frozen=True):
    """The client that requested a transfer."""

    project: str
    is_admin: bool
    """Whether registries without a public address are allowed, and the daemon's own credentials for a push."""
    auth: bytes | None = None
    """The content of an auth file."""


class Transfers:
    """Sends and receives snapshots."""

    def __init__(self, host: Host, store: Store, copies: Copies, bases: BaseFiles, settings: TransferSettings) -> None:
        self._host = host
        self._copies = copies
        self._bases = bases
        self._own = OwnSnapshots(host, store, copies, bases)
        self._settings = settings
        self._throttle = Throttle(settings.bytes_per_s)
        self._places = Places(_MAX_TRANSFERS, _OF_ONE)
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._under_way: list[Transfer] = []

    def under_way(self, project: str | None) -> list[TransferView]:
        """Returns the running transfers of a project; None for all projects."""
        return [each.view() for each in self._under_way if project in (None, each.project)]

    # Push

    async def push(self, key: Key, text: str, client: Client) -> RegistrySnapshot:
        """Sends a snapshot to a registry, under a reference with a tag. Data that the registry has is not sent.

        :raises Problem: 404; 409, it is not ready; 503. :raises TransferError: :raises ChunkError: :raises OciError:
        """
        reference = _reference(text, client.project)
        if not reference.tag:
            raise invalid("reference", "a snapshot is pushed to a tag, not to a digest", hint="write name:tag")
        snapshot = self._own.find(key)
        transfer = Transfer("push", key.project, key.name, str(reference))
        async with self._transferring(transfer), self._open(reference, client, "pull,push") as repository:
            return await self._push(snapshot, reference, repository, transfer)

    async def _push(
        self, snapshot: Snapshot, reference: Reference, repository: Repository, transfer: Transfer
    ) -> RegistrySnapshot:
        from ._artifact import MANIFEST, RegistrySink, manifest_of, put_missing

        sink, progress = RegistrySink(repository), transfer.progress
        async with self._own.sending(snapshot) as outgoing:
            await outgoing.send(sink, transfer)
        transfer.phase = "finishing"
        data, files = encode(outgoing.document), outgoing.document.files
        sent = await put_missing(repository, oci.digest_of(data), data)
        annotations = {
            "org.opencontainers.image.created": snapshot.created_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "org.opencontainers.image.title": f"snapshot {snapshot.name} of VM {snapshot.vm.name}",
        }
        manifest = manifest_of(data, [sink.blobs[digest] for digest in files.chunks], annotations)
        await repository.put_manifest(reference.tag, manifest, MANIFEST)
        await self._copies.note_push(snapshot, str(reference.with_digest(oci.digest_of(manifest))))
        _logger.info(
            "snapshot %s is at %s: %d of %d chunks were sent, %.1f MiB",
            snapshot.name, reference, progress.moved_chunks, progress.total_chunks, progress.moved_bytes / 2**20,
        )  # fmt: skip
        return RegistrySnapshot(
            reference=str(reference),
            digest=oci.digest_of(manifest),
            size_bytes=files.size,
            sent_bytes=progress.moved_bytes + sent + len(manifest),
            chunks=progress.total_chunks,
            sent_chunks=progress.moved_chunks,
        )

    # Pull

    async def pull(
        self,
        text: str,
        name: str | None,
        client: Client,
        admit: Admit,
        *,
        key: IdempotencyKey | None = None,
    ) -> Snapshot:
        """Receives a snapshot from a registry, and stores it. Chunks that this host has are not fetched.

        :param name: the new name; None for its former name
        :param admit: checks the files in its manifest; raises Problem
        :raises Problem: 400; 409, the name is taken; 503. :raises TransferError: :raises ChunkError: :raises OciError:
        :raises DuplicateRequest: the request was answered before.
        """
        reference = _reference(text, client.project)
        if name is not None:
            self._own.check_free(Key(client.project, check_name(name, "name")))
        transfer = Transfer("pull", client.project, name or "", str(reference))
        async with self._transferring(transfer), self._open(reference, client, "pull") as repository:
            return await self._pull(reference, name, client, admit, repository, transfer, key)

    async def _pull(
        self,
        reference: Reference,
        name: str | None,
        client: Client,
        admit: Admit,
        repository: Repository,
        transfer: Transfer,
        key: IdempotencyKey | None,
    ) -> Snapshot:
        from ._artifact import RegistrySource, parse_manifest

        data = await repository.manifest(reference.digest or reference.tag)
        manifest, digest = parse_manifest(data), oci.digest_of(data)
        config = await repository.blob(manifest.config.digest, manifest.config.size)
        document = decode(config, max_bytes=self._settings.max_bytes)
        chunks = document.files.chunks
        if len(chunks) != len(manifest.layers):
            raise TransferError(
                "snapshot_invalid", f"the snapshot has {len(chunks)} chunks and {len(manifest.layers)} layers"
            )
        source = RegistrySource(repository, dict(zip(chunks, manifest.layers, strict=True)))
        where = str(reference.with_digest(digest))
        incoming = Incoming(document, digest, where, client.project, name, client.auth)
        kept = await self._own.receive(incoming, source, admit, transfer, key=key)
        progress = transfer.progress
        _logger.info(
            "snapshot %s is pulled from %s: %d of %d chunks were received, %.1f MiB",
            kept.name, reference, progress.moved_chunks, progress.total_chunks, progress.moved_bytes / 2**20,
        )  # fmt: skip
        return kept

    # From host to host

    def sending(self, snapshot: Snapshot) -> AbstractAsyncContextManager[Outgoing]:
        """See `OwnSnapshots.sending`."""
        return self._own.sending(snapshot)

    async def bases_of(self, vm: VmRow) -> Bases:
        """Returns the base files of a VM of this host. :raises TransferError: `base_missing`"""
        return await self._bases.of(vm)

    async def obtain(self, vm: VmRow, bases: Bases) -> None:
        """Fetches the base files of another host's VM. :raises TransferError: one is not available."""
        await self._bases.obtain(vm.manifest, bases, vm.project, None)

    async def move_in(self, data: bytes, vm: VmRow, source: Source, transfer: Transfer) -> Snapshot:
        """Receives the snapshot of a VM that moves to this host, and stores it. Data that this host has is not fetched.

        :param data: its document; `vm` is its row on the other host, with the move
        :raises Problem: 409, the name is taken; 503. :raises TransferError: :raises ChunkError: Raises the errors of
            the source.
        """
        leaving = vm.leaving
        assert leaving is not None
        document = decode(data, max_bytes=self._settings.max_bytes)
        incoming = Incoming(
            document, f"move {leaving.id}", f"host {leaving.from_host}", vm.project, leaving.arrival, moved=vm
        )
        return await self._own.receive(incoming, source, _admit, transfer)

    async def spend(self, count: int) -> None:
        """Waits until this number of bytes may be sent: all transfers share one bandwidth."""
        await self._throttle.spend(count)

    # Both

    @asynccontextmanager
    async def _transferring(self, transfer: Transfer) -> AsyncIterator[None]:
        """Lists a transfer during the block, which begins when a slot is free."""
        if find_spec("httpcore") is None:
            raise TransferError(
                "transfer_failed", "httpcore is not installed", "run `pip install 'volant[transfer]'` and restart"
            )
        try:
            with self._places.take(transfer.project):
                self._under_way.append(transfer)
                try:
                    async with self._slots:
                        transfer.phase = "preparing"
                        with trio.fail_after(self._settings.timeout_s):
                            yield
                finally:
                    self._under_way.remove(transfer)
        except NoPlace as full:
            raise TransferError(
                "too_many_transfers", f"too many snapshots are on their way or wait: {full}", "try again later"
            ) from None
        except trio.TooSlowError:
            raise TransferError(
                "transfer_timeout",
                f"the transfer took longer than {self._settings.timeout_s:g} s",
                "call again: data that has arrived is not sent again; or raise the setting transfer_timeout_s",
            ) from None

    @asynccontextmanager
    async def _open(
        self, reference: Reference, client: Client, actions: Literal["pull", "pull,push"]
    ) -> AsyncIterator[Repository]:
        """Opens the repository of a reference. Everyone may pull with the daemon's own credentials, and administrators
        may push with them."""
        settings, auth = self._settings, client.auth
        # Importing it takes a while, and most daemons never need it.
        distribution = await trio.to_thread.run_sync(import_module, "volant.oci._distribution")
        if auth is None and settings.auth_file is not None and (actions == "pull" or client.is_admin):
            try:
                auth = oci.read_auth_file(await self._host.files.read(settings.auth_file, _MAX_AUTH_BYTES))
            except (OSError, OciError) as error:
                raise OciError(
                    "auth_file_unreadable", f"the auth file {settings.auth_file} can't be read: {error}",
                    "check the setting oci_auth_file",
                ) from error  # fmt: skip

        access = distribution.RegistryAccess(
            plain_http=settings.plain_http,
            certificates=settings.certificates,
            environment=settings.environment,
            stalled_s=settings.stalled_s,
        )
        async with distribution.open_repository(
            reference,
            access,
            auth=auth,
            actions=actions,
            resolve=registries(self._bases.artifacts, client.is_admin),
            spend=self._throttle.spend,
        ) as repository:
            yield repository


async def _admit(snapshot: Snapshot) -> None:
    """Admits everything: the VM runs in the fleet, so its files were admitted there."""
    del snapshot
    await trio.lowlevel.checkpoint()


def _reference(text: str, project: str) -> Reference:
    """Parses a reference. :raises OciError: :raises Problem: 400"""
    reference = oci.parse_reference(text, project)
    if not reference.registry:
        raise invalid("reference", "snapshots are in registries, not in files", hint="write registry/name:tag")
    return reference
