"""Whether an answer is one that the OpenAPI document tells of. The kit holds every answer of its client against it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import httpx
from openapi_schema_validator import OAS31Validator

from volant.api._openapi import HEADERS, document
from volant.operations import TABLE, Operation

_JSON = re.compile(r"application/(?:problem\+)?json\Z")


async def check(answer: httpx.Response) -> None:
    """:raises AssertionError: a status, a header or a body that the document does not have there."""
    request = answer.request
    operation = operation_of(request.method, request.url.path)
    # What is no route of ours is not described, and a bug is not promised.
    if operation is None or answer.status_code == 500:
        return
    if "upgrade" in request.headers and not operation.answers.keys() & {101, "default"}:
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


def operation_of(method: str, path: str) -> Operation | None:
    return None if method == "HEAD" else TABLE.find(method, path)


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
