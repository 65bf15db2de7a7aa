"""Volumes: disks with names that outlive VMs. Where a VM mounts one, and who may use it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from ._problem import Problem, invalid
from ._project import DEFAULT_PROJECT, Key
from ._text import NAME_PATTERN, Labels, Name, Time, check_labels, check_name, is_name

MAX_VOLUMES = 8
"""Most volumes and directories of the host of one VM. Every machine has room for that many devices."""
MAX_ALL_VOLUMES = 10_000
"""Most volumes of a daemon. All their rows are in memory."""
MIN_VOLUME_MB = 16
"""ext4 with a journal needs some 8 MiB."""
MAX_VOLUME_MB = 16 * 1024 * 1024
"""What ext4 with blocks of 4 KiB can have, and what it may take without a second thought."""
_MAX_PATH = 1024
_NOT_IN_PATH = r"\x00-\x1f\x7f:/"
SHORT_PATH = rf"(/([^{_NOT_IN_PATH}.]|\.[^{_NOT_IN_PATH}.]|\.\.[^{_NOT_IN_PATH}])[^{_NOT_IN_PATH}]*)+"
"""An absolute path in its shortest form, in a text whose parts `:` separates. Without what not all readers of JSON
Schema know, as assertions."""
_PATH = re.compile(rf"{SHORT_PATH}\Z")
_CLOSED = ("/proc", "/sys", "/dev")
"""The guest's kernel has its own file systems there."""
_OPTIONS = "(ro|rw|nocopy|(ro|rw),nocopy|nocopy,(ro|rw))"
_NAMED = rf"{NAME_PATTERN.strip('^$')}:{SHORT_PATH}/*(:{_OPTIONS})?"
_OF_HOST = rf"{SHORT_PATH}:{SHORT_PATH}/*(:(ro|rw))?"

VolumeText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^({_NAMED}|{_OF_HOST})$"})]
"""Only for the schema; `parse_mounts` decides."""

VolumeStatus = Literal["creating", "ready", "deleting"]


class CreateVolume(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/volumes`."""

    name: Name
    size_mb: Annotated[int, msgspec.Meta(ge=MIN_VOLUME_MB, le=MAX_VOLUME_MB)]
    """The size of the disk, and so the limit on the host, where it only takes what was written."""
    labels: Labels = {}


class ResizeVolume(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/volumes/{name}/resize`."""

    size_mb: Annotated[int, msgspec.Meta(ge=MIN_VOLUME_MB, le=MAX_VOLUME_MB)]
    """The new size, which can't be less than the present one."""


class CloneVolume(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/volumes/{name}/clone`."""

    name: Name
    """The name of the copy."""
    labels: Labels = {}


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """The stored state of a volume."""

    id: str
    """Names its file, and is never used again."""
    name: str
    size_mb: int
    status: VolumeStatus = "creating"
    labels: dict[str, str] = {}
    created_at: datetime
    source: str | None = None
    """The id of the volume that it is a copy of. While this one is `creating`, nothing may write to that."""
    writers: int = 0
    """How often a VM has begun to write to it."""
    project: str = DEFAULT_PROJECT

    @property
    def key(self) -> Key:
        """Finds it by name."""
        return Key(self.project, self.name)


class VolumeMount(msgspec.Struct, frozen=True, kw_only=True):
    """One volume of a VM."""

    name: str
    id: str = ""
    """Empty only in a row that the journal has not completed."""
    path: str
    """The absolute path in the guest."""
    read_only: bool = False
    nocopy: bool = False
    """Whether an empty volume stays empty, and does not receive what the VM has at the path."""
    writers: int = 0
    """The volume's count when the VM opened it last. The memory of a copy fits no other content."""

    def __str__(self) -> str:
        options = ",".join([*(["ro"] if self.read_only else []), *(["nocopy"] if self.nocopy else [])])
        return f"{self.name}:{self.path}{options and ':'}{options}"


class DirectoryMount(msgspec.Struct, frozen=True, kw_only=True):
    """A directory of the host that a VM mounts."""

    source: str
    """The absolute path on the host."""
    path: str
    """The absolute path in the guest."""
    read_only: bool = True

    def __str__(self) -> str:
        return f"{self.source}:{self.path}:{'ro' if self.read_only else 'rw'}"


class VolumeView(msgspec.Struct, frozen=True, kw_only=True):
    """A volume as the API shows it."""

    name: str
    status: VolumeStatus
    size_mb: int
    used_bytes: int | None
    """The space that it takes on the host. null: its file is missing."""
    labels: dict[str, str]
    used_by: tuple[str, ...]
    """The names of VMs that mount it, running or not."""
    writer: str | None
    """The VM that writes to it now."""
    created_at: Time
    project: str = DEFAULT_PROJECT


def parse_volume(text: str) -> VolumeMount:
    """Parses `name:/path`, which `:` and options may follow: `ro` or `rw`, `nocopy`. :raises Problem: 400."""
    name, _, rest = text.partition(":")
    path, colon, text_options = rest.partition(":")
    options = text_options.split(",") if colon else []
    known = set(options) <= {"ro", "rw", "nocopy"} and len(set(options)) == len(options)
    if not is_name(name) or not known or {"ro", "rw"} <= set(options):
        raise invalid(
            "volumes",
            f"volumes has {text[:80]!r}, which is not name:/path[:ro]",
            hint="use for example data:/var/lib/app, or data:/srv/www:ro to only read; a directory of the host begins "
            "with '/'",
        )
    return VolumeMount(name=name, path=_checked_path(path, text), read_only="ro" in options, nocopy="nocopy" in options)


def parse_directory(text: str) -> DirectoryMount:
    """Parses `/host/path:/path[:ro|:rw]`. :raises Problem: 400."""
    source, _, rest = text.partition(":")
    path, colon, mode = rest.partition(":")
    if (mode not in ("ro", "rw") and colon) or not is_short_path(source):
        raise invalid(
            "volumes",
            f"volumes has {text[:80]!r}, which is not /host/path:/path[:ro|:rw]",
            hint="give the host's path without '.' or '..' in it; for example /srv/data:/data, or /srv/data:/data:rw "
            "to write",
        )
    return DirectoryMount(source=source, path=_checked_path(path, text), read_only=mode != "rw")


def is_short_path(path: str) -> bool:
    """Returns whether it is an absolute path in its shortest form."""
    return len(path) <= _MAX_PATH and _PATH.match(path) is not None


def _checked_path(path: str, text: str) -> str:
    path = path.rstrip("/") if path.strip("/") else path
    if not is_volume_path(path):
        raise invalid(
            "volumes",
            f"volumes has {text[:80]!r}, and {path[:80]!r} is no absolute path of a directory in the guest",
            hint=f"begin it with '/', without '.' or '..' in it, and outside of {', '.join(_CLOSED)}",
        )
    return path


def is_volume_path(path: str) -> bool:
    """Returns whether a volume can be mounted there: an absolute path in its shortest form, not the root."""
    return is_short_path(path) and not any(path == closed or path.startswith(f"{closed}/") for closed in _CLOSED)


def check_create_volume(request: CreateVolume | CloneVolume) -> None:
    """Checks what the types can't say. :raises Problem: 400 that names the field."""
    check_name(request.name, "name")
    check_labels(request.labels)


def volume_view(
    volume: Volume, *, used_bytes: int | None, used_by: Iterable[str] = (), writer: str | None = None
) -> VolumeView:
    """Returns what clients see of `volume`."""
    return VolumeView(
        name=volume.name,
        status=volume.status,
        size_mb=volume.size_mb,
        used_bytes=used_bytes,
        labels=volume.labels,
        used_by=tuple(sorted(used_by)),
        writer=writer,
        created_at=volume.created_at,
        project=volume.project,
    )


def no_such_volume(name: str, *, field: str | None = None) -> Problem:
    """Returns the 404 for the name of a volume."""
    return Problem(
        404, "volume-not-found", f"there is no volume named {name[:80]!r}", field=field,
        hint="`volar volumes list` shows what there is",
    )  # fmt: skip


def volume_not_ready(volume: Volume, *, field: str | None = None) -> Problem:
    """Returns the 409 for a volume that is being made or deleted."""
    doing = "made" if volume.status == "creating" else "deleted"
    return Problem(
        409, "volume-not-ready", f"volume {volume.name!r} is being {doing}", field=field, hint="try again in a moment"
    )
