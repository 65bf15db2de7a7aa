"""Volumes: named disks that outlive VMs, and their mounts."""

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
"""Maximum volumes and directories of the host per VM. Every machine type has room for that many devices."""
MAX_ALL_VOLUMES = 10_000
"""Maximum volumes per daemon. All their rows are in memory."""
MIN_VOLUME_MB = 16
"""The minimum for ext4 with a journal, which needs some 8 MiB."""
MAX_VOLUME_MB = 16 * 1024 * 1024
"""The maximum for ext4 with blocks of 4 KiB."""
_MAX_PATH = 1024
_NOT_IN_PATH = r"\x00-\x1f\x7f:/"
SHORT_PATH = rf"(/([^{_NOT_IN_PATH}.]|\.[^{_NOT_IN_PATH}.]|\.\.[^{_NOT_IN_PATH}])[^{_NOT_IN_PATH}]*)+"
"""An absolute path in its shortest form, as part of a text whose parts `:` separates. Avoids regular expressions that
not all readers of JSON Schema support, such as assertions."""
_PATH = re.compile(rf"{SHORT_PATH}\Z")
_CLOSED = ("/proc", "/sys", "/dev")
"""Directories in which the guest's kernel mounts its own file systems."""
_OPTIONS = "(ro|rw|nocopy|(ro|rw),nocopy|nocopy,(ro|rw))"
_NAMED = rf"{NAME_PATTERN.strip('^$')}:{SHORT_PATH}/*(:{_OPTIONS})?"
_OF_HOST = rf"{SHORT_PATH}:{SHORT_PATH}/*(:(ro|rw))?"

VolumeText = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^({_NAMED}|{_OF_HOST})$"})]
"""The pattern is only for the schema; `parse_mounts` decides."""

VolumeStatus = Literal["creating", "ready", "deleting"]


class CreateVolume(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/volumes`."""

    name: Name
    size_mb: Annotated[int, msgspec.Meta(ge=MIN_VOLUME_MB, le=MAX_VOLUME_MB)]
    """The size of the disk, and so the limit on the host. Only written blocks take up space there."""
    labels: Labels = {}


class ResizeVolume(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/volumes/{name}/resize`."""

    size_mb: Annotated[int, msgspec.Meta(ge=MIN_VOLUME_MB, le=MAX_VOLUME_MB)]
    """The new size, which must not be less than the present one."""


class CloneVolume(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/volumes/{name}/clone`."""

    name: Name
    """The name of the copy."""
    labels: Labels = {}


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """The stored state of a volume."""

    id: str
    """The name of its file, which is never used again."""
    name: str
    size_mb: int
    status: VolumeStatus = "creating"
    labels: dict[str, str] = {}
    created_at: datetime
    source: str | None = None
    """The id of the volume that it is a copy of. While this volume is `creating`, nothing may write to the source."""
    writers: int = 0
    """How often a VM has opened it for writing."""
    project: str = DEFAULT_PROJECT

    @property
    def key(self) -> Key:
        """Its project and name."""
        return Key(self.project, self.name)


class VolumeMount(msgspec.Struct, frozen=True, kw_only=True):
    """One volume of a VM."""

    name: str
    id: str = ""
    """The volume's id; empty only in a row that the journal has not completed."""
    path: str
    """The absolute path in the guest."""
    read_only: bool = False
    nocopy: bool = False
    """Whether the VM's files at the path are not copied to an empty volume."""
    writers: int = 0
    """The volume's `writers` when the VM last opened it. A copied memory only fits the volume's content with this
    count."""

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
    """The space that it takes up on the host; null if its file is missing."""
    labels: dict[str, str]
    used_by: tuple[str, ...]
    """The names of VMs that mount it, running or not."""
    writer: str | None
    """The VM that writes to it now."""
    created_at: Time
    project: str = DEFAULT_PROJECT


def parse_volume(text: str) -> VolumeMount:
    """Parses `name:/path`, optionally with `:` and options: `ro` or `rw`, `nocopy`. :raises Problem: 400."""
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
    """Returns whether a volume can be mounted at this path: absolute, in its shortest form, not the root."""
    return is_short_path(path) and not any(path == closed or path.startswith(f"{closed}/") for closed in _CLOSED)


def check_create_volume(request: CreateVolume | CloneVolume) -> None:
    """Checks the rules that the types can't express. :raises Problem: 400 that names the field."""
    check_name(request.name, "name")
    check_labels(request.labels)


def volume_view(
    volume: Volume, *, used_bytes: int | None, used_by: Iterable[str] = (), writer: str | None = None
) -> VolumeView:
    """Returns the view of `volume`."""
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
    """Returns the 409 for a volume that is being created or deleted."""
    doing = "made" if volume.status == "creating" else "deleted"
    return Problem(
        409, "volume-not-ready", f"volume {volume.name!r} is being {doing}", field=field, hint="try again in a moment"
    )
