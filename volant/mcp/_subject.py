"""The object of a message, for passing the message on to the responsible host of a fleet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import msgspec

from volant.operations import Operation, Table

from ._commands import COMMANDS
from ._tools import READ_BY, RESOURCE, tools


class _Params(msgspec.Struct, frozen=True):
    name: str = ""
    arguments: dict[str, Any] = {}
    uri: str = ""


class _Message(msgspec.Struct, frozen=True):
    """A message of the protocol, or a command."""

    method: str = ""
    command: str = ""
    params: msgspec.Raw = msgspec.Raw(b"{}")


class Subjects:
    """Finds the objects of messages."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._operations: Mapping[str, str] | None = None

    def of(self, body: bytes) -> tuple[Operation, Mapping[str, Any]] | None:
        """Returns the operation that a message calls, with the arguments; None if it calls none, or is malformed."""
        try:
            message = msgspec.json.decode(body, type=_Message)
            if message.command:
                operation, _ = COMMANDS.get(message.command, ("", None))
                return self._found(operation, msgspec.json.decode(message.params, type=dict[str, Any]))
            params = msgspec.json.decode(message.params, type=_Params)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError):
            return None
        match message.method:
            case "tools/call":
                if self._operations is None:
                    self._operations = {tool.name: tool.operation for tool in tools(self._table)}
                return self._found(self._operations.get(params.name, ""), params.arguments)
            case "resources/read":
                found = RESOURCE.match(params.uri)
                if found is not None:
                    return self._found(READ_BY.get(found[2] or "", ""), {"vm": unquote(found[1])})
        return None

    def _found(self, operation: str, arguments: Mapping[str, Any]) -> tuple[Operation, Mapping[str, Any]] | None:
        return (self._table[operation], arguments) if operation else None
