"""Views of OCI images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from ._text import Name, Time

ImageReference = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=1024,
        description="`python:3.13`, `registry:5000/team/app@sha256:…`, `oci:/path:tag`, `oci-archive:/path`, "
        "`docker-archive:/path:name:tag`",
    ),
]

PullPhase = Literal["waiting", "resolving", "fetching", "converting"]


class ImagePort(msgspec.Struct, frozen=True):
    """A port on which the image's program listens."""

    port: int
    protocol: str
    """`tcp`, `udp` or `sctp`."""


class ImageHealthCheckView(msgspec.Struct, frozen=True, kw_only=True):
    """The image author's health check. Times are in seconds; 0 means the default."""

    command: tuple[str, ...]
    shell: bool
    """Whether `command` is one text that `/bin/sh -c` runs."""
    interval_s: float
    timeout_s: float
    start_period_s: float
    retries: int


class ImageLayer(msgspec.Struct, frozen=True):
    """A layer of an image."""

    diff_id: str
    """The digest of the uncompressed layer. Images with the same layer share it."""
    size_bytes: int
    """The size on disk."""


class ImageView(msgspec.Struct, frozen=True, kw_only=True):
    """An OCI image in the daemon's cache."""

    digest: str
    """The digest of its manifest, as `sha256:…`."""
    references: tuple[str, ...]
    """Complete references that last resolved to this image."""
    platform: str
    size_bytes: int
    """The size on disk, including layers that other images share."""
    own_bytes: int
    """The bytes that its removal would free."""
    layers: tuple[ImageLayer, ...]
    """The layers, lowest first."""
    created_at: Time | None
    """When it was built, according to the image itself."""
    used_at: Time
    """When it was last fetched or requested, or a VM last booted from it."""
    used_by: tuple[str, ...]
    """The VMs and snapshots that need it, such as `VM web` or `snapshot warm`."""
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    """The arguments of the entrypoint; without an entrypoint, the command."""
    env: Mapping[str, str]
    user: str
    workdir: str
    exposed_ports: tuple[ImagePort, ...]
    stop_signal: str
    labels: Mapping[str, str]
    volumes: tuple[str, ...]
    """Paths at which the image's author expects a volume."""
    health_check: ImageHealthCheckView | None


class PullImage(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The image to fetch."""

    reference: ImageReference
    refresh: bool = False
    """Whether to resolve the tag at the registry even if the cache knows it."""
    registry_secret: Name | None = None
    """A secret of the project: an auth file with credentials for the registry, instead of `Volant-Registry-Auth`."""


class PullView(msgspec.Struct, frozen=True, kw_only=True):
    """A fetch of an image that is under way."""

    reference: str
    digest: str | None
    """Null until it is known."""
    phase: PullPhase
    layers_done: int
    """The number of layers fetched and converted."""
    layers_total: int
    """The number of layers that the cache lacked; 0 if not known yet."""
    done_bytes: int
    total_bytes: int
    """The size of those layers, as the registry stores them; 0 if not known yet."""
    bytes_per_s: float
    """The rate during the last seconds."""
    waiting: int
    """The number of requests and VMs that wait for it."""


class PrunedImages(msgspec.Struct, frozen=True, kw_only=True):
    """The images and references that were removed, or that a dry run would remove."""

    dry_run: bool
    images: tuple[ImageView, ...]
    """The removed images, as they were before."""
    references: tuple[str, ...]
    """References that were removed while their image stays, because another reference or a VM needs it."""
    freed_bytes: int
