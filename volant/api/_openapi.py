"""The OpenAPI document: `_operations` and the structs that it names, put into OpenAPI's form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import msgspec

from volant import __version__
from volant.http import Nothing
from volant.model import Name, ProblemDetails, WantTicket
from volant.operations import describe, owners

from ._operations import ANY, HEADERS, JSON, OCTETS, OPERATIONS, PROBLEMS, TAGS, Answer, OneOf, Operation, Parameter

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


@cache
def document() -> Schema:
    """The document, as plain data. The same object each time, not to be changed. Takes some 50 ms at first."""
    # Through JSON, so that it is what a client reads: a default of a struct may be a tuple.
    plain: Schema = msgspec.json.decode(msgspec.json.encode(_document()))
    return plain


def _document() -> Schema:
    kinds = _Kinds(OPERATIONS)
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
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
            kinds.extend(parameter.kind for parameter in operation.parameters)
            kinds.append(operation.takes)
            for answer in operation.gives.values():
                kinds.extend((answer.kind, *answer.items))
        kinds = [single for kind in kinds for single in (kind.kinds if isinstance(kind, OneOf) else (kind,))]
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
            return {"anyOf": [self.schema(single) for single in kind.kinds]}
        return {} if kind is bytes else dict(self._schemas[repr(kind)])


def _operation(operation: Operation, kinds: _Kinds) -> Schema:
    in_path = re.findall(r"{(\w+)}", operation.path)
    shown: Schema = {
        "operationId": operation.name,
        "tags": [_tag(operation.path)],
        "summary": operation.says,
    }
    if operation.details:
        shown["description"] = operation.details
    if operation.keyless:
        shown["security"] = []
    elif operation.key_in_query:
        shown["security"] = _HEADER_KEYS + _QUERY_KEYS
    parameters = [
        {"name": name, "in": "path", "required": True, "description": says, "schema": kinds.schema(kind)}
        for name in in_path
        for kind, says in (_IN_PATH[name],)
    ]
    parameters.extend(_parameter(parameter, kinds) for parameter in operation.parameters)
    if parameters:
        shown["parameters"] = parameters
    if operation.takes is not None:
        media = operation.takes_media or (ANY if operation.takes is bytes else JSON)
        schema = kinds.schema(operation.takes)
        shown["requestBody"] = {
            "required": bool(operation.takes_media) or operation.takes not in (Nothing, WantTicket, bytes),
            "content": {**_as_bytes(operation.takes), media: {"schema": schema}},
        }
    responses: Schema = {str(status): _answer(answer, kinds) for status, answer in operation.gives.items()}
    problem = "Relayed" if _tag(operation.path) == _OF_GUESTS else "Problem"
    for status in sorted(_failures(operation, in_path)):
        if status in operation.gives:
            responses[str(status)]["content"] |= _problem(PROBLEMS[status], kinds)["content"]
        else:
            responses[str(status)] = {"$ref": f"#/components/responses/{problem}{status}"}
    shown["responses"] = responses
    return shown


def _as_bytes(kind: Any) -> Schema:
    """Bytes of whatever type, for generators that know neither `*/*` nor a database's type."""
    return {OCTETS: {"schema": {"type": "string", "format": "binary"}}} if kind is bytes else {}


def _failures(operation: Operation, in_path: Sequence[str]) -> set[int]:
    failures = {*_EVERYWHERE, *operation.fails}
    if operation.keyless:
        failures.discard(401)
    if in_path:
        failures.add(404)
    if operation.takes not in (None, bytes):
        failures.update(_WITH_BODY)
    return failures


def _parameter(parameter: Parameter, kinds: _Kinds) -> Schema:
    schema = kinds.schema(parameter.kind)
    shown: Schema = {"name": parameter.name, "in": parameter.place, "description": parameter.says}
    if parameter.repeated:
        shown["schema"] = {"type": "array", "items": schema}
    else:
        shown["schema"] = schema
        if schema.get("type") == "array":
            shown["schema"] = {**schema, "minItems": 1}
            shown |= {"style": "form", "explode": False}
    return shown


def _answer(answer: Answer, kinds: _Kinds) -> Schema:
    shown: Schema = {"description": answer.says}
    if answer.headers:
        shown["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in answer.headers}
    if answer.kind is not None:
        # Of a stream, tools hold each event against it (as OpenAPI 3.2 does with `itemSchema`), and not the text.
        schema = {} if answer.media == "text/event-stream" else kinds.schema(answer.kind)
        shown["content"] = {answer.media: {"schema": schema}}
        if answer.media == ANY:
            shown["content"] = {**_as_bytes(answer.kind), **shown["content"]}
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
