"""Plugin manifests: how a VM of a plugin boots, and what runs in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from ._problem import invalid
from ._secret import SecretRef
from ._text import Labels, Name, Plain, check_labels, check_name, check_plain
from .agent import DEFAULT_STOP_SIGNAL, MAX_USER_CHARACTERS, signal_number

MAX_MANIFEST_BYTES = 256 * 1024
"""Maximum size as JSON. The row of each VM of the plugin has a copy."""
MAX_ACTIONS = 128
MAX_DEPTH = 64
"""Maximum nesting of objects and lists in members of free form."""
_MAX_ARGUMENTS = 256
_MAX_VARIABLES = 256
_MAX_DIRECTORIES = 128
_MAX_VALUE = 32768
_MAX_VERSION = 64

_PATH_PATTERN = r"^/([A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*$"
_PATH = re.compile(_PATH_PATTERN.rstrip("$") + r"\Z")
_PRINTABLE = re.compile(r"[\x21-\x7e]*\Z")
_OPENAPI_3 = re.compile(r"3\.\d+(\.\d+)?\Z")

# `extra_json_schema` is only for the schema: the checks below have better error messages for people.
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
PlainPath = Annotated[
    str,
    msgspec.Meta(
        extra_json_schema={
            "pattern": _PATH_PATTERN,
            "maxLength": 1024,
            "not": {"pattern": r"/(\.|%2[Ee]){1,2}(/|$)"},
        }
    ),
]
"""The path of a URL, percent-encoded where necessary, without `.` and `..` and without a query."""
_Argument = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^[^\x00]*$"})]
_PROGRAM = {"type": "string", "pattern": r"^[^\x00]+$"}
_Variable = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^[^=\x00]+$"})]
_Value = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^[^\x00]*$", "maxLength": _MAX_VALUE})]
_VARIABLES = msgspec.Meta(extra_json_schema={"maxProperties": _MAX_VARIABLES})
Env = Annotated[dict[_Variable, _Value], _VARIABLES]
"""An environment."""
EnvWithSecrets = Annotated[Mapping[_Variable, _Value | SecretRef], _VARIABLES]
"""An environment in which a value can be a reference to a secret."""

GuestUser = Annotated[
    str,
    msgspec.Meta(extra_json_schema={"pattern": r"^[^\x00:][^\x00]*$", "maxLength": MAX_USER_CHARACTERS}),
]
"""A user of the guest's root filesystem: `NAME` or `UID`, optionally `:` and a group."""
_Directory = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^/[^\x00]*$", "maxLength": 4095})]

DEVTOOLS_PORT = 9222
"""The default port of browsers for DevTools clients."""


Arguments = Annotated[tuple[_Argument, ...], msgspec.Meta(max_length=_MAX_ARGUMENTS)]
"""A program's arguments, or a program with its arguments."""


class HealthCheck(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """The agent's check of the workload: an HTTP path, or a command that exits 0. A command has the workload's
    environment, user and working directory."""

    path: Annotated[str, msgspec.Meta(extra_json_schema={"pattern": r"^/[\x21-\x7e]*$", "maxLength": 1024})] | None = (
        None
    )
    """The path to fetch. A status from 200 to 399 is healthy."""
    port: Port | None = None
    """Defaults to the workload's port."""
    command: Annotated[tuple[_Argument, ...], msgspec.Meta(extra_json_schema={"maxItems": _MAX_ARGUMENTS})] = ()
    interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = 5.0
    timeout_s: Annotated[float, msgspec.Meta(ge=0.1, le=600)] = 2.0
    retries: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    """The number of consecutive failures after which the workload is unhealthy."""
    start_period_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    """How much longer than `retries` checks the workload may take until its first success."""

    SCHEMA: ClassVar[Mapping[str, Any]] = {
        "oneOf": [
            {"required": ["path"], "properties": {"path": {"type": "string"}, "command": {"maxItems": 0}}},
            {
                "required": ["command"],
                "properties": {"command": {"minItems": 1}},
                "not": {"required": ["path"], "properties": {"path": {"type": "string"}}},
            },
        ]
    }
    """The rules of `check_manifest` as JSON Schema, where the types can't express them."""


OnExit = Literal["keep", "stop", "delete"]


class Workload(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """The program that the agent runs and supervises inside the VM."""

    entrypoint: Annotated[
        tuple[_Argument, ...],
        msgspec.Meta(min_length=1, max_length=_MAX_ARGUMENTS, extra_json_schema={"prefixItems": [_PROGRAM]}),
    ]
    """The program and its arguments."""
    env: Env = {}
    """The environment. A VM's own `env` overrides it."""
    workdir: _Directory = "/"
    """The working directory, created if it does not exist. A program with a relative path, such as `./server`, is
    looked up in it; a program without a slash, in the `PATH` of `env`."""
    user: GuestUser | None = None
    """The user that it runs as: `NAME` or `UID`, optionally `:` and a group, such as `web`, `1000` or `web:adm`. `HOME`
    is that user's, unless `env` sets it. Null for root."""
    stop_signal: Annotated[str, msgspec.Meta(extra_json_schema={"pattern": "^[A-Za-z0-9+-]+$", "maxLength": 16})] = (
        DEFAULT_STOP_SIGNAL
    )
    """The signal that stops it: a name or a number, such as `SIGQUIT`, `SIGRTMIN+3` or `3`. `SIGTERM` goes to all of
    its processes, any other signal only to the program itself."""
    port: Port | None = None
    """The port of the guest's loopback on which the workload serves HTTP. The agent relays unknown routes to it."""
    restart: Literal["never", "on-failure", "always"] = "on-failure"
    """When the agent restarts it."""
    on_exit: OnExit = "keep"
    """The fate of the VM when the workload has ended and is not restarted. `keep`: it runs on. `stop`: it stops.
    `delete`: it stops and is deleted, as it is whenever it has stopped for good. A VM that has crashed is kept."""
    health_check: HealthCheck | None = None


class ExecDefaults(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """Defaults for commands that clients run in the VM. A request can override them."""

    env: Env = {}
    """The environment. A VM's own `env` overrides it."""
    user: GuestUser | None = None
    """The user, in the form of the workload's `user`. Null for root."""
    workdir: _Directory = "/"
    """The working directory, created if it does not exist."""


class Resources(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """The resources of a VM of this plugin. `memory_mb` is the minimum, `cpu_cores` a recommendation."""

    cpu_cores: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    memory_mb: Annotated[int, msgspec.Meta(ge=64, le=2**24)] = 128


class Artifact(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A file that a VM boots from, identified by its digest."""

    url: Annotated[
        str,
        msgspec.Meta(
            min_length=1, max_length=4096, extra_json_schema={"pattern": r"^(/|file://(localhost)?/|https?://)"}
        ),
    ]
    """An absolute path of the daemon's host, or a `file://`, `http://` or `https://` URL."""
    # The pattern alone would take one with a line break at its end.
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]


class OciImage(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An OCI image, whose files are the root filesystem of a VM."""

    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    """The image's reference, such as `registry:5000/name:tag`."""
    digest: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$", max_length=71)]
    """The digest of the manifest for this platform. It fixes the content, whatever the tag means now."""


class Boot(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """The files that a VM boots from. The default for each is the daemon's own."""

    kernel: Artifact | None = None
    """The kernel that QEMU boots with `-kernel`: an ELF with a PVH entry point, or a `bzImage`."""
    initramfs: Artifact | None = None
    """The initramfs. It must contain the agent."""
    rootfs: Artifact | None = None
    """A raw ext4 image for workload, exec and files. It is never written to: each VM has its own layer."""
    image: OciImage | None = None
    """An OCI image in place of `rootfs`. It is never written to: each VM has a disk of its own above it."""

    @property
    def has_disk(self) -> bool:
        """Whether a VM has a disk."""
        return self.rootfs is not None or self.image is not None


class Action(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """An action of the workload: a request to its port."""

    path: PlainPath
    """The path on which the workload serves it. The caller's query is passed on."""
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    """The method of the request to the workload. Callers always `POST`."""
    description: Plain = ""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 60.0
    """The deadline for the whole response."""
    input: dict[str, Any] | None = None
    """The JSON Schema of the body, for people and tools."""
    output: dict[str, Any] | None = None
    """The JSON Schema of the response, for people and tools."""


class DevTools(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The port for the Chrome DevTools Protocol of the workload's browser."""

    port: Port = DEVTOOLS_PORT
    """The port on the guest's loopback."""


class Cloning(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """Settings for the templates of the plugin's VMs."""

    after: Literal["agent", "workload"] = "agent"
    """When the template is taken: `agent`, before the workload starts, so each clone starts it; or `workload`, once it
    is healthy, for workloads that can be copied while they run."""
    signal: Literal["SIGHUP", "SIGUSR1", "SIGUSR2"] | None = None
    """The signal for a copied workload; null for none."""

    SCHEMA: ClassVar[Mapping[str, Any]] = {
        "if": {"required": ["signal"], "properties": {"signal": {"type": "string"}}},
        "then": {"required": ["after"], "properties": {"after": {"const": "workload"}}},
    }
    """The rules of `check_manifest` as JSON Schema, where the types can't express them."""


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """A plugin: a kind of VM."""

    name: Name
    """Unique on a host."""
    version: Annotated[
        str, msgspec.Meta(extra_json_schema={"pattern": r"^[^\x00-\x1f\x7f]*$", "maxLength": _MAX_VERSION})
    ] = "0"
    """The version, only for people."""
    schema_version: Literal["1"] = "1"
    description: Plain = ""
    runtime: Name = "base"
    """The boot image."""
    resources: Resources = Resources()
    boot: Boot | None = None
    workload: Workload | None = None
    """The workload; null for a VM with only a shell and the agent."""
    exec: ExecDefaults | None = None
    """Defaults for commands that clients run in the VM. With null they run as root in `/`, without the VM's `env`."""
    directories: Annotated[tuple[_Directory, ...], msgspec.Meta(max_length=_MAX_DIRECTORIES)] = ()
    """Directories that are created in the VM, as root, if they do not exist."""
    actions: Annotated[dict[Name, Action], msgspec.Meta(extra_json_schema={"maxProperties": MAX_ACTIONS})] = {}
    """The actions by name: `POST /api/v1/vms/{name}/actions/{plugin}/{action}`. They need the workload's `port`."""
    openapi: PlainPath | dict[str, Any] | None = None
    """The path of the workload's OpenAPI document, by default `/openapi.json`; or the document itself, which needs no
    running workload."""
    devtools: DevTools | None = None
    """The target of `/ws/v1/vms/{name}/devtools/`; null for port 9222."""
    template: Cloning = Cloning()
    """Settings for the templates of its VMs."""
    labels: Labels = {}
    """Labels of each VM of the plugin. The VM's own override them."""

    @property
    def image(self) -> OciImage | None:
        """The OCI image that VMs boot from, if any."""
        return None if self.boot is None else self.boot.image

    SCHEMA: ClassVar[Mapping[str, Any]] = {
        "if": {
            "anyOf": [
                {"required": ["actions"], "properties": {"actions": {"minProperties": 1}}},
                {"required": ["openapi"], "properties": {"openapi": {"type": "string"}}},
            ]
        },
        "then": {
            "required": ["workload"],
            "properties": {
                "workload": {"type": "object", "required": ["port"], "properties": {"port": {"type": "integer"}}}
            },
        },
        "allOf": [
            {
                "if": {
                    "required": ["template"],
                    "properties": {"template": {"required": ["after"], "properties": {"after": {"const": "workload"}}}},
                },
                "then": {"required": ["workload"], "properties": {"workload": {"type": "object"}}},
            }
        ],
    }
    """The rules of `check_manifest` as JSON Schema, where the types can't express them."""


def check_manifest(manifest: Manifest) -> Manifest:
    """Returns `manifest` if the rules hold that its types can't express. :raises Problem: 400 that names the field."""
    check_name(manifest.name, "name")
    check_name(manifest.runtime, "runtime")
    check_plain(manifest.version, "version", maximum=_MAX_VERSION)
    check_plain(manifest.description, "description")
    check_labels(manifest.labels)
    if manifest.boot is not None:
        _check_boot(manifest.boot)
    if manifest.workload is not None:
        _check_workload(manifest.workload)
    if manifest.exec is not None:
        _check_directory(manifest.exec.workdir, "exec.workdir")
        check_guest_user(manifest.exec.user, "exec.user")
        check_env(manifest.exec.env, "exec.env")
    for directory in manifest.directories:
        _check_directory(directory, "directories")
    _check_actions(manifest.actions)
    if manifest.openapi is not None:
        _check_openapi(manifest.openapi)
    _check_template(manifest)
    _check_port(manifest)
    _check_size(manifest)
    return manifest


def check_path(path: str, field: str) -> str:
    """Returns `path` if it is a `PlainPath`. :raises Problem: 400."""
    if len(path) > 1024:
        raise invalid(field, f"{field} has {len(path)} characters, at most 1024 are allowed")
    if not path.startswith("/"):
        raise invalid(field, f"{field} {path[:80]!r} does not begin with /")
    if not _PATH.match(path):
        raise invalid(
            field,
            f"{field} {path[:80]!r} is no plain path",
            hint="what a URL's path can't hold is percent-encoded; a query is the caller's to give",
        )
    if {".", ".."} & set(unquote(path).split("/")):
        raise invalid(field, f"{field} {path[:80]!r} has a '.' or '..' in it")
    return path


def check_env(env: Mapping[str, str | SecretRef], field: str) -> None:
    """Checks an environment. :raises Problem: 400, a variable's name or value is not valid in an environment."""
    if len(env) > _MAX_VARIABLES:
        raise invalid(field, f"{field} has {len(env)} variables, at most {_MAX_VARIABLES} are allowed")
    for key, value in env.items():
        if not key or "=" in key or "\0" in key:
            raise invalid(field, f"{field} has the variable name {key[:80]!r}: not empty, no '=' and no NUL")
        if isinstance(value, str) and ("\0" in value or len(value) > _MAX_VALUE):
            raise invalid(
                f"{field}.{key[:80]}", f"{field}.{key[:80]} has a NUL character or more than {_MAX_VALUE} characters"
            )


def check_guest_user(user: str | None, field: str) -> None:
    """Checks a user. :raises Problem: 400, `user` is no `GuestUser`."""
    if user is None:
        return
    if not user or user.startswith(":") or "\0" in user or len(user) > MAX_USER_CHARACTERS:
        raise invalid(
            field, f"{field} {user[:80]!r} is no user", hint="a name or a number, optionally `:` and a group: `web:adm`"
        )


def check_stop_signal(text: str, field: str) -> None:
    """Checks a signal. :raises Problem: 400, there is no such signal."""
    if signal_number(text) is None:
        raise invalid(field, f"{field} {text[:80]!r} is no signal", hint="a name such as SIGINT, or a number")


def _check_directory(path: str, field: str) -> None:
    if not path.startswith("/") or "\0" in path or len(path) > 4095:
        raise invalid(field, f"{field} is not an absolute path")


def _check_boot(boot: Boot) -> None:
    if boot.rootfs is not None and boot.image is not None:
        raise invalid("boot.image", "boot has a rootfs and an image, and a VM has one root filesystem")
    if boot.image is not None:
        check_plain(boot.image.reference, "boot.image.reference")
    for name in ("kernel", "initramfs", "rootfs"):
        artifact = getattr(boot, name)
        if artifact is not None:
            _check_url(artifact.url, f"boot.{name}.url")


def _check_url(url: str, field: str) -> None:
    check_plain(url, field)
    if url.startswith("/"):
        return
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise invalid(field, f"{field} {url[:80]!r} is no URL: {error}") from None
    if parts.scheme not in ("file", "http", "https"):
        raise invalid(
            field,
            f"{field} {url[:80]!r} is neither an absolute path nor a URL of file, http or https",
            hint="a relative path means nothing to the daemon",
        )
    if not _PRINTABLE.match(url):
        raise invalid(field, f"{field} has spaces or characters beyond ASCII", hint="percent-encode them")
    if parts.username is not None or parts.password is not None:
        raise invalid(
            field, f"{field} has a user or a password in it, and every client that may list plugins could read them"
        )
    if "#" in url:
        raise invalid(field, f"{field} has a fragment, which no server sees")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or "?" in url:
            raise invalid(field, f"{field} {url[:80]!r} is not of the form file:///absolute/path")
    elif not parts.hostname or port == 0:
        raise invalid(field, f"{field} {url[:80]!r} names no host and port")


def _check_workload(workload: Workload) -> None:
    _check_directory(workload.workdir, "workload.workdir")
    check_guest_user(workload.user, "workload.user")
    check_stop_signal(workload.stop_signal, "workload.stop_signal")
    if not workload.entrypoint[0]:
        raise invalid("workload.entrypoint", "workload.entrypoint has an empty program")
    _check_arguments(workload.entrypoint, "workload.entrypoint")
    check_env(workload.env, "workload.env")
    if workload.health_check is not None:
        _check_health_check(workload.health_check, workload.port)


def _check_arguments(arguments: tuple[str, ...], field: str) -> None:
    if len(arguments) > _MAX_ARGUMENTS:
        raise invalid(field, f"{field} has {len(arguments)} items, at most {_MAX_ARGUMENTS} are allowed")
    if any("\0" in text for text in arguments):
        raise invalid(field, f"{field} has a NUL character")


def _check_health_check(check: HealthCheck, workload_port: int | None) -> None:
    field = "workload.health_check"
    if (check.path is None) == (not check.command):
        raise invalid(field, f"{field} needs either a path or a command")
    _check_arguments(check.command, f"{field}.command")
    if check.path is None:
        return
    if check.port is None and workload_port is None:
        raise invalid(f"{field}.port", "a health check by path needs a port, its own or the workload's")
    if not check.path.startswith("/"):
        raise invalid(f"{field}.path", f"{field}.path does not begin with /")
    if len(check.path) > 1024 or not _PRINTABLE.match(check.path):
        raise invalid(f"{field}.path", f"{field}.path has spaces, characters beyond ASCII, or more than 1024")


def _check_actions(actions: Mapping[str, Action]) -> None:
    if len(actions) > MAX_ACTIONS:
        raise invalid("actions", f"actions has {len(actions)} members, at most {MAX_ACTIONS} are allowed")
    for name, action in actions.items():
        check_name(name, "actions")
        field = f"actions.{name}"
        check_path(action.path, f"{field}.path")
        check_plain(action.description, f"{field}.description")
        _check_depth(action.input, f"{field}.input")
        _check_depth(action.output, f"{field}.output")


def _check_openapi(openapi: str | dict[str, Any]) -> None:
    if isinstance(openapi, str):
        check_path(openapi, "openapi")
        return
    if not is_openapi(openapi):
        raise invalid(
            "openapi.openapi",
            "openapi is no OpenAPI document of version 3: its member openapi does not say so",
            hint="or give the path under which the workload serves its document",
        )
    _check_depth(openapi, "openapi")


def is_openapi(document: object) -> bool:
    """Returns whether a document could be OpenAPI 3."""
    version = document.get("openapi") if isinstance(document, dict) else None
    return isinstance(version, str) and _OPENAPI_3.match(version) is not None


def is_too_deep(value: object) -> bool:
    """Returns whether objects and lists are nested more than `MAX_DEPTH` deep."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        members = (item for owner in level for item in (owner.values() if isinstance(owner, dict) else owner))
        level = [item for item in members if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _check_depth(value: object, field: str) -> None:
    if is_too_deep(value):
        raise invalid(field, f"{field} is nested more than {MAX_DEPTH} deep")


def _check_template(manifest: Manifest) -> None:
    template = manifest.template
    if template.after == "workload" and manifest.workload is None:
        raise invalid("template.after", "template.after is 'workload', and there is no workload")
    if template.signal is not None and template.after != "workload":
        raise invalid(
            "template.signal", "template.signal is for a workload that is copied, which needs template.after 'workload'"
        )


def _check_port(manifest: Manifest) -> None:
    """Checks that a workload has a port if other members need one."""
    if manifest.workload is not None and manifest.workload.port is not None:
        return
    what = "actions" if manifest.actions else "openapi" if isinstance(manifest.openapi, str) else None
    if what is not None:
        field = "workload" if manifest.workload is None else "workload.port"
        raise invalid(field, f"{what} need{'' if what == 'actions' else 's'} the port of a workload that serves HTTP")


def _check_size(manifest: Manifest) -> None:
    size = len(msgspec.json.encode(manifest))
    if size > MAX_MANIFEST_BYTES:
        sizes = {name: len(msgspec.json.encode(getattr(manifest, name))) for name in manifest.__struct_fields__}
        largest = max(sizes, key=lambda name: sizes[name])
        raise invalid(
            largest,
            f"the manifest has {size} bytes, at most {MAX_MANIFEST_BYTES} are allowed; {largest} has {sizes[largest]}",
        )


BASE = Manifest(
    name="base",
    version="1",
    description="The built-in image: a shell, Python and the agent, no workload",
)
"""The built-in plugin."""
