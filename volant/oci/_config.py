"""The configuration of an image: the program that its author wants to run, and its settings.

Docker's members, which the OCI has adopted, are parsed like in Docker: a missing member, null and an empty value are
the same.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any

import msgspec

from ._errors import OciError
from ._manifest import MAX_LAYERS, Digest, Manifest, Platform, decode

_MAX_ITEMS = 1024
_MAX_TEXT = 128 * 1024
"""The kernel's limit for one argument or variable of a program."""
_MAX_NAME = 4096

_Text = Annotated[str, msgspec.Meta(max_length=_MAX_TEXT)]
_Name = Annotated[str, msgspec.Meta(max_length=_MAX_NAME)]
_Texts = Annotated[tuple[_Text, ...], msgspec.Meta(max_length=_MAX_ITEMS)]
_Set = Annotated[dict[_Name, Any], msgspec.Meta(max_length=_MAX_ITEMS)]
"""A set in Go's notation: the values are empty objects."""
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PORT = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/([a-zA-Z]{1,8}))?\Z")
_MAX_PORTS = 4096
_SIGNAL = re.compile(r"(?:[0-9]{1,2}|(?:SIG)?[A-Z][A-Z0-9+-]{1,14})\Z")
_PROTOCOLS = ("tcp", "udp", "sctp")


class Port(msgspec.Struct, frozen=True, order=True):
    """A port on which the program listens."""

    number: int
    protocol: str = "tcp"


class ImageHealthCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The image's health check. 0 means Docker's default."""

    command: tuple[str, ...]
    shell: bool = False
    """Whether `command` is one text that `/bin/sh -c` runs."""
    interval_s: float = 0.0
    timeout_s: float = 0.0
    start_period_s: float = 0.0
    retries: int = 0


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A checked configuration. No text of it contains a zero byte."""

    platform: Platform
    diff_ids: tuple[str, ...]
    """Digests of the uncompressed layers, lowest first."""
    created_at: datetime | None = None
    """When it was built, according to the image."""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    """The arguments of the entrypoint; without an entrypoint, the command."""
    env: tuple[tuple[str, str], ...] = ()
    """Variables with unique names; for repeated names the last one counts."""
    user: str = ""
    """`user`, `uid`, `user:group` or `uid:gid`; empty for root."""
    working_dir: str = ""
    """An absolute path; empty for `/`."""
    exposed_ports: tuple[Port, ...] = ()
    stop_signal: str = ""
    """A name or a number; empty for SIGTERM."""
    labels: tuple[tuple[str, str], ...] = ()
    health_check: ImageHealthCheck | None = None
    """None without a health check, also if the image disables that of its base."""
    volumes: tuple[str, ...] = ()
    """Absolute paths, sorted."""


class _HealthCheck(msgspec.Struct, frozen=True, rename="pascal"):
    test: _Texts | None = None
    interval: _Nanoseconds | None = None
    timeout: _Nanoseconds | None = None
    start_period: _Nanoseconds | None = None
    retries: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None = None


class _Execution(msgspec.Struct, frozen=True, rename="pascal"):
    entrypoint: _Texts | None = None
    cmd: _Texts | None = None
    env: _Texts | None = None
    user: _Name | None = None
    working_dir: _Name | None = None
    exposed_ports: _Set | None = None
    stop_signal: _Name | None = None
    labels: Annotated[dict[_Name, _Text | None], msgspec.Meta(max_length=_MAX_ITEMS)] | None = None
    healthcheck: _HealthCheck | None = None
    volumes: _Set | None = None


class _RootFs(msgspec.Struct, frozen=True):
    type: str
    diff_ids: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=MAX_LAYERS)]


class _Document(Platform, frozen=True, kw_only=True):
    rootfs: _RootFs
    config: _Execution | None = None
    created: _Name | None = None


def parse_config(data: bytes, manifest: Manifest, platform: Platform) -> ImageConfig:
    """Returns the configuration that belongs to a manifest.

    :raises OciError: `image_invalid`; `platform_missing`: the image is for another platform
    """
    found = decode(data, _Document, "the configuration")
    if (found.os, found.architecture) != (platform.os, platform.architecture):
        raise OciError(
            "platform_missing", f"the image is for {found.os}/{found.architecture}, not for {platform}",
            "choose another image",
        )  # fmt: skip
    if found.rootfs.type != "layers" or len(found.rootfs.diff_ids) != len(manifest.layers):
        raise _invalid(f"names {len(found.rootfs.diff_ids)} layers, and the manifest {len(manifest.layers)}")
    run = found.config or _Execution()
    return ImageConfig(
        platform=Platform(found.os, found.architecture, found.variant or None),
        diff_ids=found.rootfs.diff_ids,
        created_at=_time(found.created),
        entrypoint=_arguments("Entrypoint", run.entrypoint),
        cmd=_arguments("Cmd", run.cmd),
        env=tuple(dict(_variable(text) for text in run.env or ()).items()),
        user=_plain("User", run.user),
        working_dir=_path("WorkingDir", run.working_dir) if run.working_dir else "",
        exposed_ports=_ports(run.exposed_ports or {}),
        stop_signal=_signal(run.stop_signal),
        labels=tuple((_whole("Labels", key), _whole("Labels", text or "")) for key, text in (run.labels or {}).items()),
        health_check=_health_check(run.healthcheck),
        volumes=tuple(sorted({_path("Volumes", path) for path in run.volumes or {}})),
    )


def _time(text: str | None) -> datetime | None:
    """Returns a time; None if it is malformed, as nothing depends on it."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    # Tools that keep no time write the year 1.
    return found if found.tzinfo is not None and found.year >= 1970 else None


def _arguments(member: str, texts: tuple[str, ...] | None) -> tuple[str, ...]:
    return tuple(_whole(member, text) for text in texts or ())


def _variable(text: str) -> tuple[str, str]:
    name, _, value = _whole("Env", text).partition("=")
    if not name:
        raise _invalid(f"has the variable {text[:80]!r} in Env, without a name")
    return name, value


def _path(member: str, path: str) -> str:
    # Docker takes a relative one from the root.
    return f"/{_plain(member, path).lstrip('/')}"


def _ports(declared: dict[str, Any]) -> tuple[Port, ...]:
    found: set[Port] = set()
    for text in declared:
        match = _PORT.match(text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        protocol = (match[3] or "tcp").lower() if match else ""
        if not 1 <= first <= last <= 65535 or protocol not in _PROTOCOLS:
            raise _invalid(f"has {text[:80]!r} in ExposedPorts")
        if len(found) + last - first >= _MAX_PORTS:
            raise _invalid(f"has more than {_MAX_PORTS} ports in ExposedPorts")
        found.update(Port(number, protocol) for number in range(first, last + 1))
    return tuple(sorted(found))


def _signal(text: str | None) -> str:
    if text and not _SIGNAL.match(text):
        raise _invalid(f"has {text[:80]!r} as StopSignal")
    return text or ""


def _health_check(found: _HealthCheck | None) -> ImageHealthCheck | None:
    if found is None or not found.test:
        return None
    kind, *command = _arguments("Healthcheck", found.test)
    if kind == "NONE":
        return None
    if kind not in ("CMD", "CMD-SHELL") or not command or (kind == "CMD-SHELL" and len(command) != 1):
        raise _invalid(f"has {kind[:80]!r} with {len(command)} arguments as Healthcheck")
    return ImageHealthCheck(
        command=tuple(command),
        shell=kind == "CMD-SHELL",
        interval_s=(found.interval or 0) / 1e9,
        timeout_s=(found.timeout or 0) / 1e9,
        start_period_s=(found.start_period or 0) / 1e9,
        retries=found.retries or 0,
    )


def _plain(member: str, text: str | None) -> str:
    if text and _CONTROL.search(text):
        raise _invalid(f"has control characters in {member}")
    return text or ""


def _whole(member: str, text: str) -> str:
    if "\0" in text:
        raise _invalid(f"has a zero byte in {member}")
    return text


def _invalid(why: str) -> OciError:
    return OciError("image_invalid", f"the image's configuration {why}", "build or push the image again")
