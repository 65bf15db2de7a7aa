"""Callers: the senders of requests, and the permissions of each role."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from ._problem import Problem
from ._project import DEFAULT_PROJECT


class Permission(StrEnum):
    """The permission that a caller needs for an operation. The table of operations names one for each."""

    PUBLIC = "public"
    """No permission: anybody may call, without a key or a role."""
    VIEW = "view"
    """Read what the daemon knows of VMs."""
    USE = "use"
    """Reach into guests: commands, files, ports, consoles."""
    CONTROL = "control"
    """Create, change and delete VMs and what belongs to them."""
    ADMIN = "admin"
    """Read and change what all projects share: keys, images of the host, the daemon itself."""


class Role(StrEnum):
    """A set of permissions. Each role includes the permissions of the roles before it."""

    VIEWER = "viewer"
    USER = "user"
    OPERATOR = "operator"
    ADMIN = "admin"

    @property
    def permissions(self) -> frozenset[Permission]:
        return _PERMISSIONS[self]


_ROLES = {role.value for role in Role}
_PERMISSIONS: Mapping[Role, frozenset[Permission]] = {
    Role.VIEWER: frozenset({Permission.PUBLIC, Permission.VIEW}),
    Role.USER: frozenset({Permission.PUBLIC, Permission.VIEW, Permission.USE}),
    Role.OPERATOR: frozenset({Permission.PUBLIC, Permission.VIEW, Permission.USE, Permission.CONTROL}),
    Role.ADMIN: frozenset(Permission),
}


class RoleGrant(NamedTuple):
    """A role from the settings, for callers with this value of a claim or this name in their certificate."""

    key: str
    value: str
    role: Role
    project: str | None
    """None for all projects."""


def parse_role_grant(text: str, *, form: str, example: str) -> RoleGrant:
    """Parses `KEY=VALUE:ROLE` or `KEY=VALUE:ROLE:PROJECT`; the value may have colons.

    :param form: the name of the form `KEY=VALUE`, for the error
    :raises ValueError: the text has neither form, or fits both; the message is meant for people.
    """
    shown = repr(text.strip()[:200])
    given, _, last = text.strip().rpartition(":")
    role, project = last, None
    if last not in _ROLES:
        given, _, role = given.rpartition(":")
        project = last
    key, _, value = given.partition("=")
    if not key or not value or role not in _ROLES or project == "":
        raise ValueError(
            f"{shown} is not {form}:ROLE or {form}:ROLE:PROJECT, where ROLE is one of {', '.join(Role)}; for example "
            f"{example}"
        )
    if project is None and given.rpartition(":")[2] in _ROLES:
        raise ValueError(f"{shown} can be read in two ways, as {last!r} is a role and may be meant as a project")
    if role == Role.ADMIN:
        if project is not None:
            raise ValueError(f"{shown}: an admin has all projects, so leave the project out")
        return RoleGrant(key, value, Role.ADMIN, None)
    return RoleGrant(key, value, Role(role), project or DEFAULT_PROJECT)


ANONYMOUS = "anonymous"
"""The id and the name of the caller without credentials."""


class Caller(msgspec.Struct, frozen=True):
    """The sender of a request."""

    id: str
    """An id that never changes and is unique among all callers. Idempotency keys and tickets are bound to it."""
    name: str
    """A name for people: the user at a Unix socket, `key:NAME`, `key 1a2b3c4d`."""
    role: Role = Role.ADMIN
    project: str | None = None
    """The only project that the caller sees; None if it sees all."""
    address: str = ""
    """The source address of the request, or the user at a Unix socket."""
    credential: str = ""
    """The digest of the caller's key, the subject of its certificate, or `ANONYMOUS`. The caller's requests and tickets
    end when it becomes invalid. Empty if nothing ends them."""
    limited: bool = False
    """Whether the limits per caller apply."""

    def may(self, permission: Permission) -> bool:
        """Returns whether the caller's role has a permission."""
        return permission in self.role.permissions

    def __str__(self) -> str:
        """Returns the text for logs and events: the address, and the name if that adds something."""
        if self.name in (self.address, ANONYMOUS):
            return self.address
        return f"{self.address} {self.name}" if self.address else self.name


class SignIn(msgspec.Struct, frozen=True):
    """The data that a client needs to sign in at the issuer whose tokens the daemon accepts."""

    issuer: str
    """The URL of the OpenID Connect issuer."""
    client_id: str
    scopes: str
    """The scopes to request, separated by spaces."""


class AuthView(msgspec.Struct, frozen=True, kw_only=True):
    """The ways in which a client can authenticate. Contains nothing secret."""

    required: bool
    """Whether a client over TCP needs a key, a certificate or a token."""
    sign_in: SignIn | None
    """Null if the daemon accepts no tokens of an issuer."""
    browser_sign_in: bool
    """Whether a page of the daemon can sign in at that issuer, with `POST /api/v1/session/oidc`."""


class CallerEnded(Problem):
    """The 401 for a key that is known but no longer valid."""

    def __init__(self, caller: Caller, code: str, detail: str, *, hint: str) -> None:
        super().__init__(401, code, detail, hint=hint)
        self.caller = caller


def is_safe_url(url: str) -> bool:
    """Returns whether nobody on the network path can change the answer of a URL: it is https, or on this host."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        return False
    if not host or parts.username is not None or parts.fragment:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and host in ("127.0.0.1", "::1", "localhost"))
