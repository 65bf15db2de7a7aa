"""The OpenAPI document, built from the table of operations and the structs that it names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import msgspec

from volant import __version__
from volant.http import JSON, Nothing
from volant.model import NAME_PATTERN, Name, Permission, ProblemDetails
from volant.operations import (
    ANY,
    OCTETS,
    TABLE,
    Answer,
    OneOf,
    Operation,
    Parameter,
    Table,
    describe,
    owners,
)

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
_ABOUT = "\n\n".join(
    (
        "Errors are `application/problem+json`. Every answer has `X-Request-Id`; the client's own id is kept if it has "
        "1 to 64 letters, digits and `._:-`. Sizes are in MiB, times are RFC 3339 in UTC, durations are text such as "
        "`500ms`, `10s`, `2m`. Integers are written without a fraction: `80`, not `80.0`.",
        "Names belong to projects. A caller has one project; an administrator selects one with `Volant-Project`, or "
        "with `project` in the query unless the query belongs to a guest. `*` lists the objects of all projects.",
        "Before routing, the server may answer 400 (not HTTP), 408 (headers took over 10 s), 431 (headers over 32 KiB "
        "or 100 fields), 503 (more than 2,000 connections) or 505.",
    )
)
_IN_PATH = {
    "digest": (str, "The template's digest", "2fd4e1c67a2d28fced849ee1bb76e739"),
    "name": (Name, "The object's name", "web"),
    "sha256": (Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")], "The file's SHA-256", "0" * 64),
    "port": (Annotated[int, msgspec.Meta(ge=1, le=65535)], "A port of the guest's loopback", 8080),
    "path": (
        str,
        "The rest of the path, including slashes: a file or route in the guest, or a file of the console",
        "etc/os-release",
    ),
    "plugin": (Name, "The VM's plugin", "browser"),
    "snapshot": (Name, "The snapshot's name", "prepared"),
    "action": (Name, "An action of the plugin's manifest", "screenshot"),
    "id": (
        Annotated[str, msgspec.Meta(pattern="^[^/]+$")],
        "The command's `id`, from the first message of its WebSocket",
        "1",
    ),
    "tag": (
        Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._:@-]{1,100}$")],
        "The hypervisor's process tag",
        "volant-x-1.1",
    ),
    "target": (
        Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._-]{1,128}$")],
        "The browser's id of the page or of itself",
        "E1D2C3B4",
    ),
}
"""Types, descriptions and examples of path parameters."""
_EVERYWHERE = (400, 401, 403, 421, 429)
_WITH_BODY = (408, 413, 415)
_OF_GUESTS = "Inside a VM"


PROBLEMS = {
    400: "The body is not JSON, a field is wrong, unknown or missing, or a parameter is unknown, repeated or malformed",
    401: "The credentials are missing or invalid",
    403: "The client's address, its role or its `Origin` is not allowed, or a registry denies access to an image",
    404: "There is no object with this name",
    406: "The client accepts none of the available content types",
    408: "The body took longer than 30 s",
    409: "Not possible in the current state",
    410: "The events after the requested one have expired",
    412: "The VM has changed since `If-Match`",
    413: "The body is larger than 1 MiB, or than the route's limit",
    415: "The body is not JSON",
    416: "The file has no such range",
    421: "`Host` is not a name of this daemon",
    422: "The `Idempotency-Key` was used for another request, members contradict each other, or an image can't be used",
    426: "The route only accepts WebSockets",
    429: "The caller sent too many requests, or its project created too many VMs; `Retry-After` says when to try again",
    502: "The guest, its agent or its port does not answer",
    503: "Not possible now: no capacity, the daemon is stopping, or it can't write to its disk",
    504: "A registry or a guest does not answer in time",
    507: "The guest's or the cache's disk is full",
}
"""The meaning of each error status. The body is always `ProblemDetails`."""

HEADERS = {
    "Content-Disposition": "A name for the file",
    "Repr-Digest": "`sha-256=:…:` (RFC 9530)",
    "Volant-File-Mode": "The file's mode, in octal",
    "ETag": "Changes with every change of the VM, or of the file; for `If-Match` and `If-None-Match`",
    "Location": "The path of the new resource, or the page to which a browser is redirected",
    "Set-Cookie": "The part of a session that scripts of the page can't read",
    "Volant-Wait": "With `wait`: `met`, `failed` (it ended in another state, or was deleted) or `timeout`",
    "Volant-Event-Id": "The last event that the list includes. Follow the events from there to miss none",
    "Volant-Missing-Hosts": "Hosts of the fleet that did not answer: their objects are missing, or as last reported",
    "Idempotency-Replayed": "`true` for a repeated request, which was not executed again: this is the first answer",
    "Link": 'The next page, `<…>; rel="next"`, if there is one',
}

TAGS = {
    "VMs": "Create, change and watch VMs",
    _OF_GUESTS: "The agent, the workload and ports of a guest. Path, query and bodies are passed on byte for byte",
    "Snapshots": "Stored copies of VMs that new VMs can start from, and the fork tree",
    "Images": "OCI images that VMs boot from",
    "Plugins": "Kinds of VMs",
    "Templates": "Booted guests that new VMs are cloned from",
    "Volumes": "Disks that outlive VMs",
    "Networks": "Named networks in which VMs reach each other",
    "Secrets": "Values that VMs receive and that the API never returns",
    "Projects": "Namespaces with limits",
    "Access": "Keys, sessions and tickets, and the audit log",
    "Fleet": "Hosts that share VMs",
    "MCP and AG-UI": "Interfaces for models, and for applications that show their actions",
    "System": "The daemon itself",
}
_TAGGED = (
    (r"/(actions|agent|ports|devtools)/|{name}/openapi", _OF_GUESTS),
    (r"/(snapshots|forks|transfers)\b", "Snapshots"),
    (r"/vms\b", "VMs"),
    (r"/images\b", "Images"),
    (r"/(plugins|artifacts)\b", "Plugins"),
    (r"/templates\b", "Templates"),
    (r"/volumes\b", "Volumes"),
    (r"/networks\b", "Networks"),
    (r"/secrets\b", "Secrets"),
    (r"/projects\b", "Projects"),
    (r"/(auth|keys|session|tickets|audit)\b", "Access"),
    (r"/(fleet|hosts)\b", "Fleet"),
    (r"/(mcp|agui)\b", "MCP and AG-UI"),
    ("", "System"),
)
"""The tags of paths; the first match counts."""


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
            "summary": "MicroVMs on one or several hosts",
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


_PROJECT: Schema = {
    "name": "Volant-Project",
    "in": "header",
    "description": "The project in which names are looked up, by default `default`; only administrators can choose it",
    "schema": {"type": "string", "pattern": rf"^(\*|{NAME_PATTERN.strip('^$')})?$"},
}


_SCHEMES = {
    "key": {"type": "apiKey", "in": "header", "name": "X-Volant-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The same key"},
    "keyInQuery": {"type": "apiKey", "in": "query", "name": "api_key", "description": "The same key, for browsers"},
    "ticket": {"type": "apiKey", "in": "query", "name": "ticket", "description": "A ticket for one use within 60 s"},
}
_HEADER_KEYS: list[dict[str, list[str]]] = [{}, {"key": []}, {"bearer": []}]
"""The first is for a daemon without `VOLANT_API_KEY`, which requires no key."""
_QUERY_KEYS: list[dict[str, list[str]]] = [{"keyInQuery": []}, {"ticket": []}]


class _Kinds:
    """The schemas of all types that operations name."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        kinds: list[Any] = [ProblemDetails, *(kind for kind, *_ in _IN_PATH.values())]
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
        """Returns the schema of a type, or a reference to it."""
        if isinstance(kind, OneOf):
            return {"anyOf": [self.schema(single) for single in kind.types]}
        return {} if kind is bytes else dict(self._schemas[repr(kind)])


def _operation(operation: Operation, kinds: _Kinds) -> Schema:
    in_path = operation.arguments
    shown: Schema = {
        "operationId": operation.name,
        "tags": [_tag(operation.path)],
        "summary": operation.summary,
        "x-permission": operation.permission,
    }
    if operation.details:
        shown["description"] = operation.details
    if operation.permission is Permission.PUBLIC:
        shown["security"] = []
    elif operation.credentials_in_query:
        shown["security"] = _HEADER_KEYS + _QUERY_KEYS
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": text,
            "schema": kinds.schema(kind),
            "example": example,
        }
        for name in in_path
        for kind, text, example in (_IN_PATH[name],)
    ]
    parameters.extend(_parameter(parameter, kinds) for parameter in operation.parameters)
    if operation.permission is not Permission.PUBLIC:
        parameters.append(_PROJECT)
    if parameters:
        shown["parameters"] = parameters
    if operation.body is not None:
        media = operation.body_media or (ANY if operation.body is bytes else JSON)
        given: Schema = {"schema": kinds.schema(operation.body)}
        if operation.examples:
            given["examples"] = {what: {"value": body} for what, body in operation.examples.items()}
        shown["requestBody"] = {
            "required": bool(operation.body_media)
            or not (operation.body in (Nothing, bytes) or operation.body_optional),
            "content": {**_as_bytes(operation.body), media: given},
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
    if operation.permission is Permission.PUBLIC and 401 not in operation.errors:
        failures.discard(401)
    if in_path:
        failures.add(404)
    if operation.body not in (None, bytes):
        failures.update(_WITH_BODY)
    return failures


def _parameter(parameter: Parameter, kinds: _Kinds) -> Schema:
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
    if answer.lines:
        shown["content"]["application/x-ndjson"] = {"schema": kinds.schema(str)}
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
    return next(tag for pattern, tag in _TAGGED if re.search(pattern, path))


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
