"""OCI images as clients see them."""

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
    """How the image's author finds out whether the program works. Times are in seconds; 0: the default."""

    command: tuple[str, ...]
    shell: bool
    """Whether `command` is one text for `/bin/sh -c`."""
    interval_s: float
    timeout_s: float
    start_period_s: float
    retries: int


class ImageLayer(msgspec.Struct, frozen=True):
    """A layer of an image."""

    diff_id: str
    """The digest of the uncompressed layer. Images with the same one share it."""
    size_bytes: int
    """On the disk."""


class ImageView(msgspec.Struct, frozen=True, kw_only=True):
    """An OCI image in the daemon's cache."""

    digest: str
    """`sha256:…` of its manifest."""
    references: tuple[str, ...]
    """Complete names that last resolved to it."""
    platform: str
    size_bytes: int
    """On the disk, with layers that other images share."""
    own_bytes: int
    """What its removal would free."""
    layers: tuple[ImageLayer, ...]
    """Lowest first."""
    created_at: Time | None
    """When it was built, as it says itself."""
    used_at: Time
    """When it was last fetched or asked for, or a VM booted from it."""
    used_by: tuple[str, ...]
    """VMs and snapshots that need it: `VM web`, `snapshot warm`."""
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    """Arguments of the entrypoint; without one, the command."""
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
    """Which image to fetch."""

    reference: ImageReference
    refresh: bool = False
    """Whether to ask the registry what the tag means now, also if the cache knows it."""
    registry_secret: Name | None = None
    """A secret of the project: an auth file with credentials for the registry, instead of `Volant-Registry-Auth`."""


class PullView(msgspec.Struct, frozen=True, kw_only=True):
    """A fetch of an image that is under way."""

    reference: str
    digest: str | None
    """None until it is known."""
    phase: PullPhase
    layers_done: int
    """Fetched and converted."""
    layers_total: int
    """Those that the cache lacked; 0: not known yet."""
    done_bytes: int
    total_bytes: int
    """Of those layers, as the registry has them; 0: not known yet."""
    bytes_per_s: float
    """During the last seconds."""
    waiting: int
    """How many requests and VMs wait for it."""


class PrunedImages(msgspec.Struct, frozen=True, kw_only=True):
    """What was removed, or would be."""

    dry_run: bool
    images: tuple[ImageView, ...]
    """As they were before."""
    references: tuple[str, ...]
    """Names that were removed alone, as others or a VM need their image."""
    freed_bytes: int
