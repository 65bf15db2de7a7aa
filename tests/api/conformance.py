"""Whether an answer is one that the OpenAPI document tells of. The kit holds every answer of its client against it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import httpx
from openapi_schema_validator import OAS31Validator

from volant.api._openapi import document
from volant.api._operations import HEADERS, OPERATIONS, Operation

_JSON = re.compile(r"application/(?:problem\+)?json\Z")
_IN_PATH = {"{path}": ".*"}
"""What is not the rest of a path is one part of it."""


async def check(answer: httpx.Response) -> None:
    """:raises AssertionError: a status, a header or a body that the document does not have there."""
    request = answer.request
    operation = operation_of(request.method, request.url.path)
    # What is no route of ours is not described, and a bug is not promised.
    if operation is None or answer.status_code == 500:
        return
    if "upgrade" in request.headers and not operation.gives.keys() & {101, "default"}:
        return  # A WebSocket where there is none.
    where = f"{request.method} {request.url} -> {answer.status_code}"
    described = responses(operation)
    given = described.get(str(answer.status_code))
    if given is None:
        assert "default" in described, f"{where}: there is no such status in the document"
        return
    headers = {name.lower() for name in given.get("headers", {})}
    surplus = {name.lower() for name in HEADERS} & set(answer.headers) - headers
    assert not surplus, f"{where}: the headers {surplus} are not in the document"
    media = answer.headers.get("content-type", "").partition(";")[0]
    content = given.get("content", {})
    if not content:
        assert not media, f"{where}: there should be no body"
        return
    assert media in content or "*/*" in content, f"{where}: {media} is not in the document"
    if _JSON.match(media):
        await answer.aread()
        errors = [error.message for error in validator(operation, answer.status_code, media).iter_errors(answer.json())]
        assert not errors, f"{where}: {errors}"


@cache
def operation_of(method: str, path: str) -> Operation | None:
    for operation in OPERATIONS:
        if operation.method == method and _pattern(operation.path).match(path):
            return operation
    return None


def _part(part: str) -> str:
    return _IN_PATH.get(part, "[^/]+") if part.startswith("{") else re.escape(part)


@cache
def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"({\w+})", path)
    return re.compile("".join(_part(part) for part in parts) + r"\Z")


@cache
@cache
def responses(operation: Operation) -> dict[str, Any]:
    """By status, references resolved."""
    root = document()
    given: dict[str, Any] = root["paths"][operation.path][operation.method.lower()]["responses"]
    problems = root["components"]["responses"]
    return {
        status: problems[answer["$ref"].rpartition("/")[2]] if "$ref" in answer else answer
        for status, answer in given.items()
    }


@cache
def validator(operation: Operation, status: int, media: str) -> Any:
    schema = responses(operation)[str(status)]["content"][media]["schema"]
    return OAS31Validator(
        {**schema, "components": document()["components"]}, format_checker=OAS31Validator.FORMAT_CHECKER
    )
