"""What goes over the wire at `POST /api/v1/mcp`, for the OpenAPI document and for who answers it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class RpcMessage(msgspec.Struct, omit_defaults=True):
    """A message of JSON-RPC 2.0, as the Model Context Protocol has it: a request, a notification or an answer."""

    jsonrpc: Literal["2.0"]
    method: str | msgspec.UnsetType = msgspec.UNSET
    """What is asked for, such as `tools/call`."""
    params: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    id: int | str | msgspec.UnsetType = msgspec.UNSET
    """A notification has none."""


class RpcAnswer(msgspec.Struct, omit_defaults=True):
    """An answer of JSON-RPC 2.0: one of `result` and `error`."""

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
    """What the REST route answers; null for `delete`, and after a failure."""
    error: str
    """Empty when all is well."""
