"""Manifests and indexes of images, of the OCI and of Docker (schema 2): parsed within bounds, as they are hostile.

The OCI's image specification defines the members. Its media types and Docker's only differ in name.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, TypeVar

import msgspec

from ._errors import OciError

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
"""Maximum size of a manifest, an index or a configuration, the same as in registries."""
MAX_LAYERS = 127
"""Maximum layers, the same as in Docker."""
MAX_LAYER_BYTES = 32 * 1024**3
"""Maximum size of one layer, compressed or not."""
_MAX_ENTRIES = 1000
_SHOWN_PLATFORMS = 12
_REBUILD = "build or push the image again"

_DOCKER = "application/vnd.docker.distribution.manifest"
_OCI = "application/vnd.oci.image"
_INDEXES = (f"{_OCI}.index.v1+json", f"{_DOCKER}.list.v2+json")
_MANIFESTS = (f"{_OCI}.manifest.v1+json", f"{_DOCKER}.v2+json")
_CONFIGS = (f"{_OCI}.config.v1+json", "application/vnd.docker.container.image.v1+json")
_LAYER = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.v1\.tar(?:\+gzip|\+zstd)?|docker\.image\.rootfs\.diff\.tar(?:\.gzip|\.zstd)?)\Z"
)

Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
"""A SHA-256 digest, the only kind that images use in practice."""
_MediaType = Annotated[str, msgspec.Meta(max_length=255)]
_Word = Annotated[str, msgspec.Meta(max_length=128)]


class Platform(msgspec.Struct, frozen=True):
    """The platform of an image."""

    os: _Word = ""
    architecture: _Word = ""
    variant: _Word | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


AMD64 = Platform("linux", "amd64")
"""The platform that Volant supports."""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A reference to another document or a layer."""

    digest: Digest
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYER_BYTES)]
    """The size in bytes."""
    media_type: _MediaType = ""


class IndexEntry(Descriptor, frozen=True, rename="camel"):
    """A manifest in an index."""

    platform: Platform | None = None


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """The manifests of one image for several platforms."""

    manifests: Annotated[tuple[IndexEntry, ...], msgspec.Meta(max_length=_MAX_ENTRIES)]

    def choose(self, platform: Platform = AMD64) -> IndexEntry:
        """Returns the first manifest for a platform. :raises OciError: `platform_missing`"""
        for entry in self.manifests:
            offered = entry.platform
            if offered is None or (offered.os, offered.architecture) != (platform.os, platform.architecture):
                continue
            # An entry without a variant is the generic one, and one for x86-64-v3 may not run everywhere.
            if (offered.variant or None) == platform.variant:
                return entry
        known = dict.fromkeys(str(entry.platform) for entry in self.manifests if entry.platform is not None)
        shown = ", ".join(list(known)[:_SHOWN_PLATFORMS]) or "none"
        raise OciError(
            "platform_missing", f"the image is not built for {platform}; it is for {shown}", "choose another image"
        )


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """The parts of an image for one platform."""

    config: Descriptor
    layers: Annotated[tuple[Descriptor, ...], msgspec.Meta(max_length=MAX_LAYERS)]
    """The layers, lowest first."""


class _Head(msgspec.Struct, frozen=True, rename="camel"):
    """The members that distinguish the types of documents."""

    schema_version: int = 0
    media_type: _MediaType = ""
    artifact_type: _MediaType = ""
    manifests: Any = None
    layers: Any = None


def digest_of(data: bytes) -> str:
    """Returns the digest of a document."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def parse_manifest(data: bytes) -> Manifest | Index:
    """Returns the document that a reference leads to in a registry.

    :raises OciError: `image_invalid`; `image_unsupported`, it is no image, or one that can't be used
    """
    head = decode(data, _Head, "the manifest")
    if head.schema_version != 2:
        raise _unsupported(f"its manifest has schema {head.schema_version}", "push it again with a recent tool")
    if head.media_type in _INDEXES or (not head.media_type and head.manifests is not None):
        return decode(data, Index, "the index")
    if head.media_type not in (*_MANIFESTS, ""):
        raise _unsupported(f"it is of the type {head.media_type!r}")
    if head.artifact_type or head.layers is None:
        raise _unsupported(f"it is of the type {head.artifact_type!r}, which is no image")
    manifest = decode(data, Manifest, "the manifest")
    if manifest.config.media_type not in _CONFIGS:
        raise _unsupported(f"its configuration is of the type {manifest.config.media_type!r}")
    if manifest.config.size > MAX_DOCUMENT_BYTES:
        raise OciError("image_invalid", f"the image's configuration has {manifest.config.size} bytes", _REBUILD)
    if not manifest.layers:
        raise _unsupported("it has no layers")
    for layer in manifest.layers:
        if not _LAYER.match(layer.media_type):
            kind = "is encrypted" if layer.media_type.endswith("encrypted") else f"is of the type {layer.media_type!r}"
            raise _unsupported(f"its layer {layer.digest} {kind}")
    return manifest


def decode(data: bytes, kind: type[T], what: str) -> T:
    """Returns a hostile document with its members checked. :raises OciError: `image_invalid`"""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise OciError("image_invalid", f"{what} has more than {MAX_DOCUMENT_BYTES // 2**20} MiB", _REBUILD)
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise OciError("image_invalid", f"{what} of the image is wrong: {str(error)[:300]}", _REBUILD) from error


def _unsupported(why: str, hint: str = "build it as a container image for Linux") -> OciError:
    return OciError("image_unsupported", f"the image can't be used: {why}", hint)
