"""JSON answers."""

from __future__ import annotations

import msgspec
from quart import Response

JSON = "application/json"

_encoder = msgspec.json.Encoder()


def empty_response(status: int) -> Response:
    """An answer without a body: 204, 304."""
    response = Response(b"", status=status)
    for name in ("Content-Type", "Content-Length"):
        response.headers.pop(name, None)
    return response


def json_response(value: object, status: int = 200) -> Response:
    """`value` as JSON: structs, dataclasses, plain data."""
    return Response(_encoder.encode(value), status=status, content_type=JSON)
