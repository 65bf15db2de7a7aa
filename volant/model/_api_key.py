"""Named API keys, which administrators give to colleagues, CI jobs and agents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated

import msgspec

from ._caller import Role
from ._problem import Problem, invalid
from ._project import DEFAULT_PROJECT
from ._text import Name, Time, check_name

KEY_PREFIX = "vlt_"
"""The prefix of every key, by which secret scanners find it."""
MAX_API_KEYS = 20_000
"""Maximum per daemon, including replaced keys. All of them are in memory."""
_TEN_YEARS_S = 10 * 366 * 86400.0

Lifetime = Annotated[float, msgspec.Meta(gt=0, le=_TEN_YEARS_S)]


class CreateApiKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/keys`."""

    name: Name
    role: Role
    project: Name | None = None
    """The project that the key sees; null for `default`. An administrator's key sees all projects and has none."""
    expires_in_s: Lifetime | None = None
    """How long the key is valid; by default until it is deleted."""


class RotateApiKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/keys/{name}/rotate`."""

    overlap_s: Annotated[float, msgspec.Meta(ge=0, le=_TEN_YEARS_S)] = 0
    """How long the present key stays valid; with 0 it ends at once."""
    expires_in_s: Lifetime | None = None
    """How long the new key is valid; by default until it is deleted."""


class NewApiKey(msgspec.Struct, frozen=True):
    """The answer that shows a key, once."""

    name: str
    key: str


class KeyUse(msgspec.Struct, frozen=True, gc=False):
    """When and from where a key was last used."""

    at: datetime
    address: str


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The stored state of a key."""

    digest: str
    """The SHA-256 of the key, in hexadecimal. The key itself is not stored."""
    id: str
    """Identifies the holder of the key. A replacement keeps the id."""
    name: str
    role: Role
    project: str | None
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None
    used: KeyUse | None = None
    replaced: bool = False
    """Whether a newer key of this name exists."""

    def is_valid(self, now: datetime) -> bool:
        """Returns whether the key has not expired."""
        return self.expires_at is None or now < self.expires_at


class ReplacedKeyView(msgspec.Struct, frozen=True, kw_only=True):
    """A key that was replaced and is still valid."""

    expires_at: Time
    last_used_at: Time | None
    last_used_from: str | None


class ApiKeyView(msgspec.Struct, frozen=True, kw_only=True):
    """A key as the API shows it. The key itself is never shown again."""

    name: str
    role: Role
    project: str | None
    """Null if the key sees every project."""
    created_at: Time
    created_by: str
    expires_at: Time | None
    """Null if the key is valid until it is deleted."""
    expired: bool
    last_used_at: Time | None
    """Exact to a minute; null if the key was never used."""
    last_used_from: str | None
    """The address of the last use."""
    replaced: tuple[ReplacedKeyView, ...]
    """Earlier keys of this name that are still valid."""


def check_create_key(request: CreateApiKey) -> None:
    """:raises Problem: 400."""
    check_name(request.name, "name")
    if request.project is not None:
        check_name(request.project, "project")
        if request.role is Role.ADMIN:
            raise invalid(
                "project",
                "an administrator's key sees every project, and has none of its own",
                hint="leave `project` out, or choose another role",
            )


def project_of(request: CreateApiKey) -> str | None:
    """Returns the project of a new key; None if the key sees every project."""
    return None if request.role is Role.ADMIN else request.project or DEFAULT_PROJECT


def key_view(keys: Sequence[ApiKey], now: datetime) -> ApiKeyView:
    """Returns the view of all keys of one name."""
    (key,) = (each for each in keys if not each.replaced)
    return ApiKeyView(
        name=key.name,
        role=key.role,
        project=key.project,
        created_at=key.created_at,
        created_by=key.created_by,
        expires_at=key.expires_at,
        expired=not key.is_valid(now),
        last_used_at=None if key.used is None else key.used.at,
        last_used_from=None if key.used is None else key.used.address,
        replaced=tuple(
            ReplacedKeyView(
                expires_at=each.expires_at,
                last_used_at=None if each.used is None else each.used.at,
                last_used_from=None if each.used is None else each.used.address,
            )
            for each in sorted(keys, key=lambda each: each.created_at)
            if each.replaced and each.expires_at is not None and each.is_valid(now)
        ),
    )


def administrates(keys: Iterable[ApiKey], now: datetime) -> bool:
    """Returns whether one of some keys is a valid administrator's key that was not replaced."""
    return any(key.role is Role.ADMIN and not key.replaced and key.is_valid(now) for key in keys)


def no_such_key(name: str) -> Problem:
    """Returns the 404 for the name of a key."""
    return Problem(404, "key-not-found", f"there is no key named {name[:80]!r}", hint="`volar keys list` shows all")
