"""JSON bodies of requests and answers of Quart's routes."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from quart import Response, request

from volant.http import BODY_S, JSON, Query, decode_body

T = TypeVar("T")
U = TypeVar("U")

_encoder = msgspec.json.Encoder()


def empty_response(status: int) -> Response:
    """Returns an answer without a body: 204, 304."""
    response = Response(b"", status=status)
    for name in ("Content-Type", "Content-Length"):
        response.headers.pop(name, None)
    return response


def json_response(value: object, status: int = 200) -> Response:
    """Returns `value` as JSON: structs, dataclasses, plain data."""
    return Response(_encoder.encode(value), status=status, content_type=JSON)


def no_query() -> None:
    """Checks the current request. :raises Problem: 400, it has a parameter."""
    if request.query_string:
        Query(request.query_string).done()


async def read_body(kind: type[T]) -> T:
    """Decodes the body of the current request.

    :raises Problem: 400, not JSON, or not of this type; 415, another content type. Quart raises 408 and 413.
    """
    return decode_body(await _read(), request.mimetype, kind)


async def read_body_or(otherwise: T) -> T:
    """Decodes the body of the current request as the type of `otherwise`; returns `otherwise` if there is no body.
    :raises Problem: see `read_body`.
    :raises Problem: as `read_body`."""
    data = await _read()
    return decode_body(data, request.mimetype, type(otherwise)) if data else otherwise


async def read_one_of(member: str, kind: type[T], otherwise: type[U]) -> T | U:
    """Decodes the body of the current request: as `kind` if it is an object with that member, otherwise as the type of
    `otherwise`. :raises Problem: see `read_body`.
    :raises Problem: as `read_body`."""
    data = await _read()
    try:
        has = member in msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        has = False
    return decode_body(data, request.mimetype, kind) if has else decode_body(data, request.mimetype, otherwise)


async def _read() -> bytes:
    request.body_timeout = BODY_S
    return await request.get_data(False, False, False)
