"""The format of an error: RFC 9457 with the additions of the contract."""

from __future__ import annotations

import secrets
from http import HTTPStatus

import msgspec

from volant.model import Problem, ProblemDetails

PROBLEM_JSON = b"application/problem+json"

_encoder = msgspec.json.Encoder()


def new_request_id() -> str:
    """Returns 16 hexadecimal digits, for the header `X-Request-Id`, the log and the error's body."""
    return secrets.token_hex(8)


def problem_body(problem: Problem, request_id: str) -> bytes:
    """Returns the body of the answer for `problem`."""
    return _encoder.encode(
        ProblemDetails(
            type=f"urn:volant:error:{problem.code}",
            title=_phrase(problem.status),
            status=problem.status,
            detail=problem.detail,
            error=problem.detail,
            request_id=request_id,
            vm=problem.vm,
            field=problem.field,
            hint=problem.hint,
        )
    )


def problem_headers(body: bytes, request_id: str) -> list[tuple[bytes, bytes]]:
    """Returns the headers for `body`."""
    return [
        (b"content-type", PROBLEM_JSON),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode("ascii")),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
    ]


def not_json(content_type: str) -> Problem:
    """Returns the 415 for a body of another type."""
    return Problem(
        415, "unsupported-media-type", f"the body is {content_type[:80]!r}, not JSON",
        hint="send it with Content-Type: application/json",
    )  # fmt: skip


def too_large(limit: int) -> Problem:
    """Returns the 413."""
    return Problem(413, "body-too-large", f"the body is larger than {limit} bytes")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
