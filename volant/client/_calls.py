"""Encodings of the arguments of the client's methods."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from volant.model import format_duration, invalid

from ._errors import UnexpectedAnswer


def body_of(request: msgspec.Struct | Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the members of a body that differ from their defaults: a daemon of another version may not know the
    others."""
    if isinstance(request, Mapping):
        return request
    return {
        field.name: value
        for field in msgspec.structs.fields(request)
        for value in (getattr(request, field.name),)
        if field.required or value != _default(field)
    }


def duration(seconds: float | None) -> str | None:
    """Returns a duration as text."""
    return None if seconds is None else format_duration(round(seconds, 3))


def flag(value: bool) -> str | None:
    """Returns `true`; None for the default."""
    return "true" if value else None


def pairs(values: Mapping[str, str] | None) -> Sequence[str]:
    """Returns each pair as `key=value`."""
    return [f"{key}={value}" for key, value in (values or {}).items()]


def part(value: str, name: str) -> str:
    """Returns a value as one part of a path. :raises Problem: 400, it is empty, `.` or `..`, which would change the
    path."""
    if value in ("", ".", ".."):
        raise invalid(name, f"{name} is {value!r}, which names nothing")
    return quote(value.encode("utf-8", "surrogateescape"), safe="")


def registry_headers(auth: str | None) -> Mapping[str, str]:
    """Returns the header with credentials for registries, if there are any."""
    return {} if auth is None else {"Volant-Registry-Auth": auth}


def words(values: Collection[str]) -> str | None:
    """Returns words separated by commas; None if there are none. A single word may be passed as text."""
    return (values if isinstance(values, str) else ",".join(str(value) for value in values)) or None


async def read_whole(chunks: AsyncIterator[bytes], limit: int, what: str) -> bytes:
    """Returns the rest of a body. :raises UnexpectedAnswer: it is longer than `limit` bytes."""
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise UnexpectedAnswer(f"{what} is longer than {limit} bytes")
    return bytes(body)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
