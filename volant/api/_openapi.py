"""The OpenAPI document, built from the table of operations and the structs that it names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import msgspec

from volant import __version__
from volant.http import JSON, Nothing
from volant.model import Name, ProblemDetails
from volant.operations import (
    ANY,
    OCTETS,
    TABLE,
    Answer,
    Described,
    OneOf,
    Operation,
    Permission,
    Table,
    describe,
    owners,
)

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
_ABOUT = "\n\n".join(
    (
        "Errors are `application/problem+json`. Every answer has `X-Request-Id`; a client's own is kept when it is 1 "
        "to 64 letters, digits and `._:-`. Sizes are MiB, times RFC 3339 in UTC, durations text such as `500ms`, "
        "`10s`, `2m`. Integers are written without a fraction: `80`, not `80.0`.",
        "Before it looks for a route, the server itself may answer 400 (not HTTP), 408 (headers over 10 s), 431 "
        "(headers over 32 KiB), 503 (more than 2,000 connections) or 505.",
    )
)
_IN_PATH = {
    "digest": (str, "The template's digest"),
    "name": (Name, "Its name"),
    "sha256": (Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")], "The file's SHA-256"),
    "port": (Annotated[int, msgspec.Meta(ge=1, le=65535)], "A port of the guest's loopback"),
    "path": (str, "The path in the guest, with its slashes"),
    "plugin": (Name, "The VM's plugin"),
    "snapshot": (Name, "Its name"),
    "action": (Name, "One that the plugin's manifest names"),
    "id": (Annotated[str, msgspec.Meta(pattern="^[^/]+$")], "The `id` in the first message of its WebSocket"),
    "mark": (Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._:@-]{1,100}$")], "The hypervisor's process tag"),
    "target": (Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._-]{1,128}$")], "The browser's name for it"),
}
_EVERYWHERE = (400, 401, 403, 421)
_WITH_BODY = (408, 413, 415)
_OF_GUESTS = "Inside a VM"


PROBLEMS = {
    400: "A body that is no JSON, a wrong, unknown or missing field; an unknown, repeated or malformed parameter",
    401: "The daemon requires an API key",
    403: "An address that is not allowed, or a foreign `Origin`",
    404: "Nothing has this name",
    406: "There is no representation that the client accepts",
    408: "The body took longer than 30 s",
    409: "Not possible in the current state",
    410: "The events after that one are not kept",
    412: "The VM has changed since `If-Match`",
    413: "The body is larger than 1 MiB, or than what the route takes",
    415: "The body is not JSON",
    416: "The file has no such range",
    421: "`Host` is not a name of this daemon",
    422: "The `Idempotency-Key` was used for another request, or members of the body contradict each other",
    426: "This is a WebSocket",
    502: "The guest, its agent or its port does not answer",
    503: "Not possible now: no capacity, the daemon stops, or its disk does not take the change",
    507: "The guest's or the cache's disk is full",
}
"""What each error status means; the body is always `ProblemDetails`."""

HEADERS = {
    "Content-Disposition": "A name for the file",
    "Repr-Digest": "`sha-256=:…:` (RFC 9530)",
    "Volant-File-Mode": "The file's mode, octal",
    "ETag": "Changes with every change of the VM, or of the file; for `If-Match` and `If-None-Match`",
    "Location": "The path of the new resource",
    "Volant-Wait": "With `wait`: `met`, `failed` (it ended in another state, or was deleted) or `timeout`",
    "Volant-Event-Id": "The last event in the list. Follow the events from there to miss nothing",
    "Idempotency-Replayed": "`true` for a repeated request: nothing was done now, and this is the first answer",
    "Link": '`<…>; rel="next"` if there are more',
}

TAGS = {
    "VMs": "Create, change and watch VMs",
    "Inside a VM": "The agent, the workload and ports of a guest. Path, query and bodies pass byte for byte",
    "Plugins": "Kinds of VMs",
    "Templates": "Booted guests that new VMs are cloned from",
    "Snapshots": "Stored copies of VMs that new VMs can start from",
    "Networks": "Named networks in which VMs reach each other",
    "System": "The daemon itself",
}


@cache
def document(table: Table = TABLE) -> Schema:
    """Returns the document of a table, as plain data; the same object each time. Takes some 50 ms at first."""
    # Through JSON, so that it is what a client reads: a default of a struct may be a tuple.
    plain: Schema = msgspec.json.decode(msgspec.json.encode(_document(table)))
    return plain


def _document(table: Table) -> Schema:
    kinds = _Kinds(tuple(table))
    paths: dict[str, Schema] = {}
    for operation in table:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, kinds)
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "Volant",
            "version": __version__,
            "summary": "MicroVMs on one host",
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The daemon that this document comes from"}],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "security": _HEADER_KEYS,
        "paths": paths,
        "components": {
            "schemas": kinds.components,
            "responses": {
                **{f"Problem{status}": _problem(text, kinds) for status, text in PROBLEMS.items()},
                **{f"Relayed{status}": _relayed_problem(text, kinds) for status, text in PROBLEMS.items()},
            },
            "headers": {
                name: {"description": text, "schema": {"type": "string"}} for name, text in sorted(HEADERS.items())
            },
            "securitySchemes": _SCHEMES,
        },
    }


_SCHEMES = {
    "key": {"type": "apiKey", "in": "header", "name": "X-Volant-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The same key"},
    "keyInQuery": {"type": "apiKey", "in": "query", "name": "api_key", "description": "The same key, for browsers"},
    "ticket": {"type": "apiKey", "in": "query", "name": "ticket", "description": "For one use, within 60 s"},
}
_HEADER_KEYS: list[dict[str, list[str]]] = [{}, {"key": []}, {"bearer": []}]
"""The first is for a daemon without `VOLANT_API_KEY`, which requires no key."""
_QUERY_KEYS: list[dict[str, list[str]]] = [{"keyInQuery": []}, {"ticket": []}]


class _Kinds:
    """The schemas of all types that operations name."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        kinds: list[Any] = [ProblemDetails, *(kind for kind, _ in _IN_PATH.values())]
        for operation in operations:
            kinds.extend(parameter.schema for parameter in operation.parameters)
            kinds.append(operation.body)
            for answer in operation.answers.values():
                kinds.extend((answer.type, *answer.items))
        kinds = [single for kind in kinds for single in (kind.types if isinstance(kind, OneOf) else (kind,))]
        # Without bytes: msgspec's schema for them is base64, which bodies are not.
        unique = {repr(kind): kind for kind in kinds if kind is not None and kind is not bytes}
        schemas, self.components = msgspec.json.schema_components(unique.values(), ref_template=_REFERENCE)
        self._schemas = dict(zip(unique, schemas, strict=True))
        for kind in unique.values():
            for owner in owners(kind):
                describe(owner, self.components[owner.__name__])
        self.components = dict(sorted(self.components.items()))
        for schema in self.components.values():
            _describe_defaults(schema)

    def schema(self, kind: Any) -> Schema:
        """The schema of a type, or a reference to it."""
        if isinstance(kind, OneOf):
            return {"anyOf": [self.schema(single) for single in kind.types]}
        return {} if kind is bytes else dict(self._schemas[repr(kind)])


def _operation(operation: Operation, kinds: _Kinds) -> Schema:
    in_path = operation.arguments
    shown: Schema = {
        "operationId": operation.name,
        "tags": [_tag(operation.path)],
        "summary": operation.summary,
    }
    if operation.details:
        shown["description"] = operation.details
    if operation.permission is Permission.PUBLIC:
        shown["security"] = []
    elif operation.credentials_in_query:
        shown["security"] = _HEADER_KEYS + _QUERY_KEYS
    parameters = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": kinds.schema(kind)}
        for name in in_path
        for kind, text in (_IN_PATH[name],)
    ]
    parameters.extend(_parameter(parameter, kinds) for parameter in operation.parameters)
    if parameters:
        shown["parameters"] = parameters
    if operation.body is not None:
        media = operation.body_media or (ANY if operation.body is bytes else JSON)
        schema = kinds.schema(operation.body)
        shown["requestBody"] = {
            "required": bool(operation.body_media)
            or not (operation.body in (Nothing, bytes) or operation.body_optional),
            "content": {**_as_bytes(operation.body), media: {"schema": schema}},
        }
    responses: Schema = {str(status): _answer(answer, kinds) for status, answer in operation.answers.items()}
    problem = "Relayed" if _tag(operation.path) == _OF_GUESTS else "Problem"
    for status in sorted(_failures(operation, in_path)):
        if status in operation.answers:
            responses[str(status)]["content"] |= _problem(PROBLEMS[status], kinds)["content"]
        else:
            responses[str(status)] = {"$ref": f"#/components/responses/{problem}{status}"}
    shown["responses"] = responses
    return shown


def _as_bytes(kind: Any) -> Schema:
    """Returns a media type for bytes of any type, for generators that support neither `*/*` nor a database's type."""
    return {OCTETS: {"schema": {"type": "string", "format": "binary"}}} if kind is bytes else {}


def _failures(operation: Operation, in_path: Sequence[str]) -> set[int]:
    failures = {*_EVERYWHERE, *operation.errors}
    if operation.permission is Permission.PUBLIC:
        failures.discard(401)
    if in_path:
        failures.add(404)
    if operation.body not in (None, bytes):
        failures.update(_WITH_BODY)
    return failures


def _parameter(parameter: Described, kinds: _Kinds) -> Schema:
    schema = kinds.schema(parameter.schema)
    shown: Schema = {"name": parameter.name, "in": parameter.place, "description": parameter.help}
    if parameter.repeated:
        shown["schema"] = {"type": "array", "items": schema}
    else:
        shown["schema"] = schema
        if schema.get("type") == "array":
            shown["schema"] = {**schema, "minItems": 1}
            shown |= {"style": "form", "explode": False}
    return shown


def _answer(answer: Answer, kinds: _Kinds) -> Schema:
    shown: Schema = {"description": answer.text}
    if answer.headers:
        shown["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in answer.headers}
    if answer.type is not None:
        # For a stream, tools apply the schema to each event (as OpenAPI 3.2 does with `itemSchema`), not to the text.
        schema = {} if answer.media == "text/event-stream" else kinds.schema(answer.type)
        shown["content"] = {answer.media: {"schema": schema}}
        if answer.media == ANY:
            shown["content"] = {**_as_bytes(answer.type), **shown["content"]}
    if answer.streams:
        shown["content"]["text/event-stream"] = {"schema": {}}
    if answer.items:
        shown["x-items"] = {"anyOf": [kinds.schema(item) for item in answer.items]}
    return shown


def _problem(text: str, kinds: _Kinds) -> Schema:
    content = {"application/problem+json": {"schema": kinds.schema(ProblemDetails)}}
    return {"description": text, "content": content}


def _relayed_problem(text: str, kinds: _Kinds) -> Schema:
    problem = {"anyOf": [kinds.schema(ProblemDetails), {"type": "object", "description": "The guest's own"}]}
    content = {"application/problem+json": {"schema": problem}, ANY: {"schema": {}}}
    return {"description": f"{text}; or the guest's own answer", "content": content}


def _tag(path: str) -> str:
    if re.search(r"/(actions|agent|ports|devtools)/|{name}/openapi", path):
        return _OF_GUESTS
    if "/snapshots" in path:
        return "Snapshots"
    if "/vms" in path:
        return "VMs"
    if "/templates" in path:
        return "Templates"
    if "/networks" in path:
        return "Networks"
    return "Plugins" if "/plugins" in path or "/artifacts" in path else "System"


def _describe_defaults(schema: Schema) -> None:
    """Moves defaults of members into their descriptions, and adds `items` to arrays of anything.

    openapi-typescript makes a member with a `default` required, in requests too; openapi-python-client supports no
    array without `items`.
    """
    for member in schema.get("properties", {}).values():
        if member.get("type") == "array" and "prefixItems" not in member:
            member.setdefault("items", {})
        default = member.pop("default", None)
        if default not in (None, "", {}, [], ()):
            text = f"Default: `{msgspec.json.encode(default).decode()}`."
            member["description"] = f"{member['description']} {text}" if "description" in member else text
