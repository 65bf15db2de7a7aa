"""Secrets: named values that VMs receive and that the API never returns."""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, Protocol

import msgspec

from ._problem import Problem, contradictory, invalid
from ._project import DEFAULT_PROJECT, Key
from ._text import NAME_PATTERN, Name, Time, check_name, is_name
from ._volume import SHORT_PATH, DirectoryMount, VolumeMount, is_short_path

MAX_SECRET_BYTES = 64 * 1024
"""Maximum length of a value. Longer data belongs in a file on a volume."""
MAX_SECRETS = 1000
"""Maximum per daemon. All their rows are in memory."""
MAX_SECRETS_OF_VM = 32
"""Maximum per VM, variables and files together."""
_DIRECTORY = "/run/secrets"
"""The default directory for files of secrets, as in Docker."""
_IN_MEMORY = "/run/"
_AGENTS = "/run/volant"
"""Paths with this prefix belong to the agent."""

SecretText = Annotated[
    str, msgspec.Meta(extra_json_schema={"pattern": rf"^{NAME_PATTERN.strip('^$')}(:/run{SHORT_PATH})?$"})
]
"""The pattern is only for the schema; `parse_secrets` decides."""


class SetSecret(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `PUT /api/v1/secrets/{name}`."""

    value: str
    """The value, which is not empty and has at most 64 KiB."""
    encoding: Literal["text", "base64"] = "text"
    """With `base64`, `value` is the base64 of the bytes."""

    def __repr__(self) -> str:
        return "SetSecret(…)"


class SecretRef(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A secret as the value of an environment variable."""

    secret: Name


class SecretFile(msgspec.Struct, frozen=True):
    """A secret as a file of a VM."""

    name: str
    path: str
    """The absolute path in the guest, below `/run`."""

    def __str__(self) -> str:
        return self.name if self.path == f"{_DIRECTORY}/{self.name}" else f"{self.name}:{self.path}"


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """The stored state of a secret."""

    name: str
    project: str = DEFAULT_PROJECT
    version: int
    """1 for a new secret. Each new value increases it."""
    key_id: str
    """The first digits of the digest of the encryption key."""
    sealed: bytes
    """The nonce, and the encrypted value."""
    created_at: datetime
    updated_at: datetime

    @property
    def key(self) -> Key:
        """Its project and name."""
        return Key(self.project, self.name)


class SecretView(msgspec.Struct, frozen=True, kw_only=True):
    """A secret as the API shows it. Its value is never shown."""

    name: str
    version: int
    """Increased by each new value."""
    readable: bool
    """Whether the daemon has the encryption key."""
    used_by: tuple[str, ...]
    """The names of VMs that refer to it, running or not."""
    created_at: Time
    updated_at: Time
    """When the value was set."""
    project: str = DEFAULT_PROJECT


class ReencryptedSecrets(msgspec.Struct, frozen=True):
    """The result of re-encrypting all secrets."""

    reencrypted: int
    """The number of secrets that were encrypted with another key before."""
    unreadable: tuple[str, ...]
    """The secrets without their key, each as `project/name`."""


class HasSecrets(Protocol):
    """A VM row, as far as this module needs it."""

    @property
    def secret_env(self) -> Mapping[str, str]: ...

    @property
    def secrets(self) -> tuple[SecretFile, ...]: ...


def secrets_of(vm: HasSecrets) -> tuple[str, ...]:
    """Returns the names of the secrets that a VM refers to, sorted."""
    return tuple(sorted({*vm.secret_env.values(), *(file.name for file in vm.secrets)}))


def value_of(request: SetSecret) -> bytes:
    """Returns the bytes of a value. :raises Problem: 400; its text contains no part of the value."""
    try:
        if request.encoding == "base64":
            value = binascii.a2b_base64(request.value.encode("ascii"), strict_mode=True)
        else:
            value = request.value.encode()
    except (ValueError, UnicodeError):
        raise invalid("value", f"value is not {request.encoding}") from None
    if not value:
        raise invalid(
            "value", "value is empty", hint="send the secret on standard input: volar secrets set NAME < file"
        )
    if len(value) > MAX_SECRET_BYTES:
        raise invalid(
            "value", f"value has {len(value)} bytes, at most {MAX_SECRET_BYTES} are allowed",
            hint="store larger values in a volume, encrypted with a key that is a secret",
        )  # fmt: skip
    return value


def split_env(env: Mapping[str, str | SecretRef]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the variables with plain values, and the names of secrets by variable."""
    plain = {key: value for key, value in env.items() if isinstance(value, str)}
    return plain, {key: value.secret for key, value in env.items() if isinstance(value, SecretRef)}


def parse_secrets(texts: Sequence[str]) -> tuple[SecretFile, ...]:
    """Parses the secrets of a VM that are files, each as `name` or `name:/run/path`.

    :raises Problem: 400, one is malformed; 422, two have the same path.
    """
    # First, as each is compared with each.
    _check_number(len(texts))
    found: list[SecretFile] = []
    for text in texts:
        name, colon, path = text.partition(":")
        if not is_name(name):
            raise invalid(
                "secrets", f"secrets has {text[:80]!r}, which is not name[:/run/path]",
                hint=f"use for example db-password, which is then {_DIRECTORY}/db-password",
            )  # fmt: skip
        file = SecretFile(name, path if colon else f"{_DIRECTORY}/{name}")
        if not is_secret_path(file.path):
            raise invalid(
                "secrets",
                f"secrets has {text[:80]!r}, and {path[:80]!r} is no path of a file below {_IN_MEMORY}",
                hint="elsewhere it would be on a disk; let a link or the program's configuration lead there",
            )
        if any(file.path == other.path or _is_below(file.path, other.path) for other in found) or any(
            _is_below(other.path, file.path) for other in found
        ):
            raise contradictory("secrets", f"secrets has the path {file.path!r} twice, or a path below it")
        found.append(file)
    return tuple(found)


def is_secret_path(path: str) -> bool:
    """Returns whether a secret's file can have this path: absolute, in its shortest form, and in the guest's memory."""
    return is_short_path(path) and path.startswith(_IN_MEMORY) and not path.startswith(_AGENTS)


def check_secrets(
    env: Mapping[str, str], files: Sequence[SecretFile], mounts: Iterable[VolumeMount | DirectoryMount]
) -> None:
    """Checks the secrets of a VM. `env` has their names by variable, `mounts` its volumes and directories.

    :raises Problem: 400; 422, a file would be on a volume.
    """
    for variable, name in env.items():
        check_name(name, f"env.{variable[:80]}.secret")
    _check_number(len(env) + len(files))
    for mount in mounts:
        for file in files:
            if file.path == mount.path or _is_below(file.path, mount.path):
                raise contradictory(
                    "secrets", f"the secret {file.name!r} would be at {file.path}, on the mount {mount}"
                )


def _check_number(number: int) -> None:
    if number > MAX_SECRETS_OF_VM:
        raise invalid("secrets", f"{number} variables and files are secrets, and a VM can have {MAX_SECRETS_OF_VM}")


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(f"{directory}/")


def secret_view(secret: Secret, *, readable: bool, used_by: Iterable[str]) -> SecretView:
    """Returns the view of `secret`."""
    return SecretView(
        name=secret.name,
        version=secret.version,
        readable=readable,
        used_by=tuple(sorted(used_by)),
        created_at=secret.created_at,
        updated_at=secret.updated_at,
        project=secret.project,
    )


def no_such_secret(name: str, *, field: str | None = None) -> Problem:
    """Returns the 404 for the name of a secret."""
    return Problem(
        404, "secret-not-found", f"there is no secret named {name[:80]!r}", field=field,
        hint=f"`volar secrets list` shows what there is; `volar secrets set {name[:80]} < FILE` sets it",
    )  # fmt: skip
