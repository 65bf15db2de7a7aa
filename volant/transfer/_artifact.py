"""A snapshot as an OCI artifact: a manifest, the snapshot's document as its configuration, and its chunks as layers.

A registry stores a blob once per repository, however many manifests name it, and removes blobs without a manifest. So
each chunk is a layer, and related snapshots share layers. A chunk is compressed, and its blob has the digest of the
compressed bytes; the document has the digests of the chunks themselves, in the order of the layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

import msgspec
import trio
import zstandard

from volant.chunks import MAX_PIECES, ChunkError, Received, check_chunk
from volant.oci import Descriptor, Repository

from ._document import MAX_DOCUMENT_BYTES
from ._transfer import TransferError

ARTIFACT = "application/vnd.volant.snapshot.v1"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.volant.snapshot.config.v1+json"
_CHUNK = "application/vnd.volant.snapshot.chunk.v1+zstd"
_LEVEL = 3
"""The compression level. Of guests' memory, level 1 leaves 28 % at 560 MB/s, level 3 26 % at 340, and level 6 25 % at
120."""
_MORE = 4096
"""Maximum growth of incompressible data by compression."""


class _Head(msgspec.Struct, frozen=True, rename="camel"):
    """The type of a manifest. Decodes nothing else, as the rest may be anything."""

    artifact_type: str = ""
    media_type: str = ""


class ArtifactManifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The manifest of an OCI artifact."""

    schema_version: int = 2
    media_type: Annotated[str, msgspec.Meta(max_length=255)] = MANIFEST
    artifact_type: Annotated[str, msgspec.Meta(max_length=255)] = ""
    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=MAX_PIECES)]
    annotations: dict[str, str] = {}


def manifest_of(document: bytes, chunks: Sequence[Descriptor], annotations: Mapping[str, str]) -> bytes:
    """Returns the manifest of a snapshot."""
    manifest = ArtifactManifest(
        artifact_type=ARTIFACT,
        config=Descriptor(digest=_blob_digest(document), size=len(document), media_type=_CONFIG),
        layers=tuple(chunks),
        annotations=dict(annotations),
    )
    return msgspec.json.encode(manifest)


def parse_manifest(data: bytes) -> ArtifactManifest:
    """Returns the manifest that a reference leads to in a registry. :raises TransferError: `snapshot_unsupported`,
    `snapshot_invalid`: it is no snapshot."""
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.artifact_type != ARTIFACT:
            what = (head.artifact_type or head.media_type or "no media type")[:100]
            raise TransferError(
                "snapshot_unsupported", f"it is no snapshot of a VM, but {what!r}",
                "`volar images pull` fetches images; check name and tag",
            )  # fmt: skip
        manifest = msgspec.json.decode(data, type=ArtifactManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TransferError("snapshot_invalid", f"the manifest of the snapshot is wrong: {str(error)[:300]}") from error
    if manifest.config.size > MAX_DOCUMENT_BYTES or manifest.config.media_type != _CONFIG:
        raise TransferError("snapshot_invalid", "the manifest names no document of a snapshot")
    if any(layer.media_type != _CHUNK for layer in manifest.layers):
        raise TransferError("snapshot_unsupported", "a layer of the snapshot is no chunk that this version knows")
    return manifest


class RegistrySink:
    """Sends chunks to a repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.blobs: dict[str, Descriptor] = {}
        """The blobs of stored chunks, by the chunks' digests."""

    async def lacks(self, digests: Sequence[str]) -> Collection[str]:
        await trio.lowlevel.checkpoint()
        # The registry knows compressed chunks only.
        return digests

    async def put(self, digest: str, data: bytes) -> int:
        blob = await trio.to_thread.run_sync(_compress, data)
        descriptor = Descriptor(digest=_blob_digest(blob), size=len(blob), media_type=_CHUNK)
        sent = await put_missing(self._repository, descriptor.digest, blob)
        self.blobs[digest] = descriptor
        return sent


class RegistrySource:
    """Gets chunks from a repository."""

    def __init__(self, repository: Repository, blobs: Mapping[str, Descriptor]) -> None:
        """Creates it. `blobs` are by the digests of chunks."""
        self._repository = repository
        self._blobs = blobs

    async def get(self, digest: str, length: int) -> Received:
        blob = self._blobs[digest]
        if blob.size > length + _MORE:
            raise TransferError(
                "snapshot_invalid", f"a chunk of {length} bytes has {blob.size} in the registry", "push it again"
            )
        data = await self._repository.blob(blob.digest, blob.size)
        return Received(await trio.to_thread.run_sync(_decompress, digest, data, length), len(data))


async def put_missing(repository: Repository, digest: str, data: bytes) -> int:
    """Sends a blob if the repository lacks it; returns the number of sent bytes."""
    if await repository.has_blob(digest):
        return 0
    await repository.put_blob(digest, data)
    return len(data)


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(data)


def _decompress(digest: str, data: bytes, length: int) -> bytes:
    """Returns a chunk of exactly `length` bytes. Allocates no more, whatever the data declare.

    :raises ChunkError: `chunk_mismatch`
    """
    try:
        # The decompressor allocates what the frame announces.
        if zstandard.get_frame_parameters(data).content_size != length:
            raise ChunkError("chunk_mismatch", f"the chunk {digest} has another size than it should", "push it again")
        chunk = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ChunkError("chunk_mismatch", f"the chunk {digest} can't be decompressed: {error}") from error
    check_chunk(digest, chunk)
    return chunk


def _blob_digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
