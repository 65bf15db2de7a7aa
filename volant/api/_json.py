"""JSON answers."""

from __future__ import annotations

import msgspec
from quart import Response

_encoder = msgspec.json.Encoder()


def json_response(value: object, status: int = 200) -> Response:
    """`value` as JSON: structs, dataclasses, plain data."""
    return Response(_encoder.encode(value), status=status, content_type="application/json")
