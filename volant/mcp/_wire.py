"""The messages of `POST /api/v1/mcp`, for the OpenAPI document and the handlers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class RpcMessage(msgspec.Struct, omit_defaults=True):
    """A JSON-RPC 2.0 message of the Model Context Protocol: a request, a notification or a response."""

    jsonrpc: Literal["2.0"]
    method: str | msgspec.UnsetType = msgspec.UNSET
    """The method, such as `tools/call`."""
    params: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    id: int | str | msgspec.UnsetType = msgspec.UNSET
    """A notification has none."""


class RpcAnswer(msgspec.Struct, omit_defaults=True):
    """A JSON-RPC 2.0 response: either `result` or `error`."""

    jsonrpc: Literal["2.0"]
    id: int | str | None
    result: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    error: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Command(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A command in the API's own form, which is not MCP's."""

    command: str
    """`volant.vms.list`, `volant.vms.create`, `volant.vms.get`, `volant.vms.delete` or
    `volant.system.get_capabilities`."""
    params: dict[str, Any] = {}
    """`create` takes the body of `POST /api/v1/vms`, `get` and `delete` take `name`, `list` takes `status` (an
    array), `plugin` and `labels`, all optional."""


class CommandAnswer(msgspec.Struct, frozen=True):
    """The answer to a `Command`."""

    result: Any
    """The answer of the REST route; null for `delete`, and after a failure."""
    error: str
    """Empty if the command succeeded."""
