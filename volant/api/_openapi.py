"""The OpenAPI document: the table of operations and the structs that it names, put into OpenAPI's form."""

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
        "Before a route is looked at, the server itself may answer 400 (not HTTP), 408 (headers over 10 s), 431 "
        "(headers over 32 KiB), 503 (more than 2,000 connections) or 505.",
    )
)
_IN_PATH = {
    "digest": (str, "Of a template"),
    "name": (Name, "Its name"),
    "sha256": (Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")], "Of the file"),
    "port": (Annotated[int, msgspec.Meta(ge=1, le=65535)], "Of the guest's loopback"),
    "path": (str, "The path in the guest, slashes and all"),
    "plugin": (Name, "The VM's own"),
    "snapshot": (Name, "Its name"),
    "action": (Name, "One that the plugin's manifest names"),
    "id": (Annotated[str, msgspec.Meta(pattern="^[^/]+$")], "What the first message of its WebSocket said"),
    "mark": (Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._:@-]{1,100}$")], "Names the hypervisor"),
    "target": (Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._-]{1,128}$")], "The browser's name for it"),
}
_EVERYWHERE = (400, 401, 403, 421)
_WITH_BODY = (408, 413, 415)
_OF_GUESTS = "Inside a VM"


PROBLEMS = {
    400: "A body that is no JSON, a wrong, unknown or missing field; an unknown, repeated or malformed parameter",
    401: "The daemon asks for an API key",
    403: "An address that is not allowed, or a foreign `Origin`",
    404: "There is none of this name",
    406: "What the client accepts is not what there is",
    408: "The body took longer than 30 s",
    409: "Not possible in the present state",
    410: "The events after that one are not kept",
    412: "The VM has changed since `If-Match`",
    413: "The body is larger than 1 MiB, or than what the route takes",
    415: "The body is not JSON",
    416: "The file has no such range",
    421: "`Host` is not a name of this daemon",
    422: "The `Idempotency-Key` was used for another request, or members of the body contradict each other",
    426: "This is a WebSocket",
    502: "The guest, its agent or its port does not answer",
    503: "The daemon can't now: no capacity, it stops, or its disk does not take the change",
    507: "The disk is full: that of the guest, or the cache's",
}
"""What each error status means; the body is always `ProblemDetails`."""

HEADERS = {
    "Content-Disposition": "A name for the file",
    "Repr-Digest": "`sha-256=:…:` (RFC 9530)",
    "Volant-File-Mode": "The mode, octal",
    "ETag": "Changes with every change of the VM, or of the file; for `If-Match` and `If-None-Match`",
    "Location": "The path of what was made",
    "Volant-Wait": "With `wait`: `met`, `failed` (it came to rest in another state, or is gone) or `timeout`",
    "Volant-Event-Id": "The event up to which the list is true: follow the events from there and miss nothing",
    "Idempotency-Replayed": "`true` when the request came before: nothing was done now, and this is the first answer",
    "Link": '`<…>; rel="next"` when there are more',
}

TAGS = {
    "VMs": "Make, change and watch VMs",
    "Inside a VM": "The agent, the workload and ports of a guest. Path, query and bodies pass byte for byte",
    "Plugins": "Kinds of VMs",
    "Templates": "What VMs begin as clones of",
    "Snapshots": "Copies of VMs that are kept, to go on from",
    "Networks": "Named networks in which VMs reach each other",
    "System": "The daemon about itself",
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
        "tags": [{"name": name, "description": says} for name, says in TAGS.items()],
        "security": _HEADER_KEYS,
        "paths": paths,
        "components": {
            "schemas": kinds.components,
            "responses": {
                **{f"Problem{status}": _problem(says, kinds) for status, says in PROBLEMS.items()},
                **{f"Relayed{status}": _relayed_problem(says, kinds) for status, says in PROBLEMS.items()},
            },
            "headers": {
                name: {"description": says, "schema": {"type": "string"}} for name, says in sorted(HEADERS.items())
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
"""The first: a daemon without `VOLANT_API_KEY` asks nobody."""
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
        # The types that are in a schema by themselves: bytes are said to be base64 there, which bodies are not.
        unique = {repr(kind): kind for kind in kinds if kind is not None and kind is not bytes}
        schemas, self.components = msgspec.json.schema_components(unique.values(), ref_template=_REFERENCE)
        self._schemas = dict(zip(unique, schemas, strict=True))
        for kind in unique.values():
            for owner in owners(kind):
                describe(owner, self.components[owner.__name__])
        self.components = dict(sorted(self.components.items()))
        for schema in self.components.values():
            _say_defaults(schema)

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
        {"name": name, "in": "path", "required": True, "description": says, "schema": kinds.schema(kind)}
        for name in in_path
        for kind, says in (_IN_PATH[name],)
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
    """Bytes of whatever type, for generators that know neither `*/*` nor a database's type."""
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
        # Of a stream, tools hold each event against it (as OpenAPI 3.2 does with `itemSchema`), and not the text.
        schema = {} if answer.media == "text/event-stream" else kinds.schema(answer.type)
        shown["content"] = {answer.media: {"schema": schema}}
        if answer.media == ANY:
            shown["content"] = {**_as_bytes(answer.type), **shown["content"]}
    if answer.streams:
        shown["content"]["text/event-stream"] = {"schema": {}}
    if answer.items:
        shown["x-items"] = {"anyOf": [kinds.schema(item) for item in answer.items]}
    return shown


def _problem(says: str, kinds: _Kinds) -> Schema:
    content = {"application/problem+json": {"schema": kinds.schema(ProblemDetails)}}
    return {"description": says, "content": content}


def _relayed_problem(says: str, kinds: _Kinds) -> Schema:
    problem = {"anyOf": [kinds.schema(ProblemDetails), {"type": "object", "description": "The guest's own"}]}
    content = {"application/problem+json": {"schema": problem}, ANY: {"schema": {}}}
    return {"description": f"{says}; or the guest says so, in its own words", "content": content}


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


def _say_defaults(schema: Schema) -> None:
    """Put defaults of members into words, and an `items` to arrays of anything.

    Generators take a member that has a `default` for one that is always there, and ask it of a request as well
    (openapi-typescript), or know no array without `items` (openapi-python-client).
    """
    for member in schema.get("properties", {}).values():
        if member.get("type") == "array" and "prefixItems" not in member:
            member.setdefault("items", {})
        default = member.pop("default", None)
        if default not in (None, "", {}, [], ()):
            said = f"Default: `{msgspec.json.encode(default).decode()}`."
            member["description"] = f"{member['description']} {said}" if "description" in member else said
