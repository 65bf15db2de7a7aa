"""The actions as data, from which the manifest, the OpenAPI document and the checks of requests are made."""

from __future__ import annotations

import math
from typing import Any

PORT = 8080
"""The port of the actions, on the guest's loopback."""
DEVTOOLS_PORT = 9222
"""The port of Chromium's DevTools, on the guest's loopback."""
MAX_TIMEOUT_S = 120
MAX_PIXELS = 32_000_000
"""Most pixels of a screenshot: several copies, with four bytes a pixel, have to fit into the guest's memory."""

Schema = dict[str, Any]

_TIMEOUT: Schema = {
    "type": "number",
    "minimum": 0.1,
    "maximum": MAX_TIMEOUT_S,
    "default": 60,
    "description": "Seconds for all of it.",
}
_TARGET: Schema = {
    "type": "string",
    "minLength": 1,
    "maxLength": 128,
    "description": "The id of a page, as DevTools' json/list has it. Default: the page of the last action.",
}
_TEXT: Schema = {"type": "string"}
_PAGE: Schema = {
    "url": {"type": "string", "description": "Where the page is in the end."},
    "title": {"type": "string"},
    "target": {"type": "string", "description": "The id of the page."},
}


def _input(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {**properties, "target": _TARGET, "timeout_s": _TIMEOUT},
        "required": list(required),
        "additionalProperties": False,
    }


def _output(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


ACTIONS: dict[str, dict[str, Any]] = {
    "navigate": {
        "description": "Open an address, and wait until the page is there.",
        "input": _input(
            ("url",),
            url={"type": "string", "minLength": 1, "maxLength": 65536, "description": "With its scheme."},
            wait_until={
                "type": "string",
                "enum": ["commit", "domcontentloaded", "load", "networkidle"],
                "default": "load",
                "description": "What is waited for; `networkidle`: half a second without a request.",
            },
        ),
        "output": _output(
            **_PAGE,
            status={"type": ["integer", "null"], "description": "The HTTP status; null where there was no HTTP."},
        ),
    },
    "screenshot": {
        "description": "A picture of the page.",
        "input": _input(
            full_page={"type": "boolean", "default": False, "description": "All of it, not what a window shows."},
            format={"type": "string", "enum": ["png", "jpeg", "webp"], "default": "png"},
            quality={"type": "integer", "minimum": 1, "maximum": 100, "description": "Of a JPEG or WebP."},
            width={"type": "integer", "minimum": 1, "maximum": 8192, "description": "Of the window, for this picture."},
            height={"type": "integer", "minimum": 1, "maximum": 8192, "description": "Likewise."},
        ),
        "output": {"type": "string", "contentMediaType": "image/png"},
        "media": ["image/png", "image/jpeg", "image/webp"],
    },
    "pdf": {
        "description": "The page as it would be printed.",
        "input": _input(
            paper={"type": "string", "enum": ["a3", "a4", "a5", "letter", "legal"], "default": "a4"},
            landscape={"type": "boolean", "default": False},
            print_background={"type": "boolean", "default": True},
            scale={"type": "number", "minimum": 0.1, "maximum": 2, "default": 1},
            margin_cm={"type": "number", "minimum": 0, "maximum": 10, "default": 1},
            pages={
                "type": "string",
                "maxLength": 1000,
                "description": "Which of them, as in `1-3,5`. Default: all.",
            },
        ),
        "output": {"type": "string", "contentMediaType": "application/pdf"},
        "media": ["application/pdf"],
    },
    "evaluate": {
        "description": "What a JavaScript expression is worth in the page; a promise is waited for.",
        "input": _input(("expression",), expression={"type": "string", "minLength": 1, "maxLength": 900_000}),
        "output": _output(
            value={"description": "As JSON; null for what JSON has not, such as NaN and undefined."},
            type={"type": "string", "description": "As `typeof` says."},
        ),
    },
    "content": {
        "description": "The HTML of the page as it is now.",
        "input": _input(),
        "output": _output(**_PAGE, html={"type": "string"}),
    },
}


class BadInput(Exception):
    """The body of a request does not fit the action; `field` says where."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def checked(action: str, body: object) -> dict[str, Any]:
    """Returns the fields of `body` with defaults filled in. :raises BadInput: if one is invalid"""
    schema = ACTIONS[action]["input"]
    if not isinstance(body, dict):
        raise BadInput("", "the body is no JSON object")
    properties: dict[str, Schema] = schema["properties"]
    for name in body:
        if name not in properties:
            raise BadInput(str(name)[:80], f"unknown field {str(name)[:80]!r}; there are {', '.join(properties)}")
    for name in schema["required"]:
        if name not in body:
            raise BadInput(name, f"{name} is missing")
    for name, value in body.items():
        _check(name, value, properties[name])
    defaults = {name: field["default"] for name, field in properties.items() if "default" in field}
    return {**dict.fromkeys(properties), **defaults, **body}


_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float)}


def _check(name: str, value: object, schema: Schema) -> None:
    kind = schema["type"]
    # In Python a bool is an int.
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise BadInput(name, f"{name} is no {kind}")
    if "enum" in schema and value not in schema["enum"]:
        raise BadInput(name, f"{name} is none of {', '.join(schema['enum'])}")
    if isinstance(value, str):
        low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if not low <= len(value) <= high:
            raise BadInput(name, f"{name} has {len(value)} characters, and may have from {low} to {high}")
    if isinstance(value, int | float) and "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        raise BadInput(name, f"{name} is not between {schema['minimum']} and {schema['maximum']}")


def manifest_actions() -> dict[str, Any]:
    """Returns the `actions` of the plugin's manifest."""
    return {
        name: {
            "path": f"/{name}",
            "method": "POST",
            "description": action["description"],
            # Longer than the caller's timeout, so that the answer about the timeout still arrives.
            "timeout_s": MAX_TIMEOUT_S + 30,
            "input": action["input"],
            "output": action["output"],
        }
        for name, action in ACTIONS.items()
    }


def openapi() -> dict[str, Any]:
    """Returns the OpenAPI document of the server."""
    problem = {
        "description": "What went wrong, and what to do about it",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    paths: dict[str, Any] = {}
    for name, action in ACTIONS.items():
        media = action.get("media", ["application/json"])
        schema = action["output"] if media == ["application/json"] else None
        paths[f"/{name}"] = {
            "post": {
                "operationId": name,
                "summary": action["description"],
                "requestBody": {
                    "required": bool(action["input"]["required"]),
                    "content": {"application/json": {"schema": action["input"]}},
                },
                "responses": {
                    "200": {
                        "description": action["description"],
                        "content": {kind: {"schema": schema} if schema else {} for kind in media},
                    },
                    "default": problem,
                },
            }
        }
    paths["/healthz"] = {
        "get": {
            "operationId": "healthz",
            "summary": "Whether the browser answers.",
            "responses": {
                "200": {
                    "description": "It does",
                    "content": {"application/json": {"schema": _output(status=_TEXT, browser=_TEXT)}},
                },
                "503": problem,
            },
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Browser", "version": "1", "description": "Chromium in a VM."},
        "paths": paths,
        "components": {
            "schemas": {
                "Problem": {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "detail": {"type": "string"},
                        "field": {"type": "string"},
                        "hint": {"type": "string"},
                    },
                    "required": ["type", "title", "status", "detail"],
                }
            }
        },
    }
