"""Plugin manifests: what a kind of VM is made of and what runs in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ._problem import invalid
from ._text import Name, check_name, check_plain

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

DEVTOOLS_PORT = 9222
"""Where browsers listen for DevTools clients unless they are told otherwise."""


class HealthCheck(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """How the agent finds out whether the workload is well: an HTTP path, or a command that exits 0."""

    path: str | None = None
    port: Port | None = None
    """Defaults to the workload's port."""
    command: tuple[str, ...] = ()
    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 5.0
    timeout_s: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 2.0
    retries: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3


class Workload(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """The program that the agent runs and supervises inside the VM."""

    entrypoint: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=256)]
    env: dict[str, str] = {}
    workdir: str = "/"
    port: Port | None = None
    """Where the workload serves HTTP on the guest's loopback; unknown routes of the agent go there."""
    restart: Literal["never", "on-failure", "always"] = "on-failure"
    health_check: HealthCheck | None = None


class Resources(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """What a VM of this plugin gets when `POST /vms` is silent, and the least that it may have."""

    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    memory_mb: Annotated[int, msgspec.Meta(ge=64)] = 128


class Artifact(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A file that a VM boots from, known by its digest."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    """An absolute path of the daemon's host, or a `file://`, `http://` or `https://` URL."""
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Boot(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """What a VM boots from; what is not given is the daemon's own."""

    kernel: Artifact | None = None
    initramfs: Artifact | None = None
    rootfs: Artifact | None = None
    """A raw ext4 image, in which workload, exec and files act. It is never written to: each VM has its own layer."""


class Action(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """Something that the workload does when it is asked: a request to its port."""

    path: Annotated[str, msgspec.Meta(pattern="^/", max_length=1024)]
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    description: str = ""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 60.0
    input: dict[str, Any] | None = None
    """JSON Schema of the body, for people and tools."""
    output: dict[str, Any] | None = None
    """JSON Schema of the answer, likewise."""


class DevTools(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where the workload's browser speaks the Chrome DevTools Protocol."""

    port: Port = DEVTOOLS_PORT
    """Of the guest's loopback."""


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """A plugin."""

    name: Name
    version: str = "0"
    schema_version: Literal["1"] = "1"
    description: str = ""
    runtime: Name = "base"
    resources: Resources = Resources()
    boot: Boot | None = None
    workload: Workload | None = None
    actions: dict[Name, Action] = {}
    """By name; each is `POST /api/v1/vms/{name}/actions/{plugin}/{action}`. They need the workload's `port`."""
    openapi: str | dict[str, Any] | None = None
    """The OpenAPI document of the workload: itself, or the path under which the workload serves it."""
    devtools: DevTools | None = None
    """Where `/ws/v1/vms/{name}/devtools/` leads; without it, port 9222."""
    labels: dict[str, str] = {}


def check_manifest(manifest: Manifest) -> Manifest:
    """Return `manifest` when what its types can't say holds too; :raises Problem: 400 that names the field."""
    check_name(manifest.name, "name")
    check_name(manifest.runtime, "runtime")
    check_plain(manifest.description, "description")
    workload = manifest.workload
    if workload is None:
        return manifest
    if not workload.workdir.startswith("/"):
        raise invalid("workload.workdir", "workload.workdir is not an absolute path")
    for text in workload.entrypoint:
        if "\0" in text:
            raise invalid("workload.entrypoint", "workload.entrypoint has a NUL character")
    check_env(workload.env, "workload.env")
    check = workload.health_check
    if check is not None:
        if (check.path is None) == (not check.command):
            raise invalid("workload.health_check", "workload.health_check needs either a path or a command")
        if check.path is not None and check.port is None and workload.port is None:
            raise invalid(
                "workload.health_check.port", "a health check by path needs a port, its own or the workload's"
            )
        if check.path is not None and not check.path.startswith("/"):
            raise invalid("workload.health_check.path", "workload.health_check.path does not begin with /")
    return manifest


def check_env(env: dict[str, str], field: str) -> None:
    """:raises Problem: 400 when a variable's name or value can't be put into an environment."""
    if len(env) > 256:
        raise invalid(field, f"{field} has {len(env)} variables, at most 256 are allowed")
    for key, value in env.items():
        if not key or "=" in key or "\0" in key:
            raise invalid(field, f"{field} has the variable name {key[:80]!r}: not empty, no '=' and no NUL")
        if "\0" in value or len(value) > 32768:
            raise invalid(
                f"{field}.{key[:80]}", f"{field}.{key[:80]} has a NUL character or more than 32768 characters"
            )


BASE = Manifest(
    name="base",
    version="1",
    description="The built-in image: a shell, Python and the agent, no workload",
)
"""The plugin that is always there."""
