"""The API's own commands at `POST /api/v1/mcp`: `{"command": …, "params": {…}}`, whose failures are answers with
the status 200, too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import msgspec

from volant import __version__
from volant.http import Nothing, decode, first_problem
from volant.model import CreateVm, Name, Problem, Status, invalid
from volant.operations import Table, acting, name_target, vms

from ._tool import ToolCall


class RpcMessage(msgspec.Struct, omit_defaults=True):
    """A JSON-RPC 2.0 message of the Model Context Protocol: a request, a notification or a response."""

    jsonrpc: Literal["2.0"]
    method: str | msgspec.UnsetType = msgspec.UNSET
    """The method, such as `tools/call`."""
    params: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    id: int | str | msgspec.UnsetType = msgspec.UNSET
    """The id of a request; a notification has none."""


class RpcAnswer(msgspec.Struct, omit_defaults=True):
    """A JSON-RPC 2.0 response: either `result` or `error`."""

    jsonrpc: Literal["2.0"]
    id: int | str | None
    result: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    error: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Command(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A command in the API's own form, not in MCP's."""

    command: str
    """`volant.vms.list`, `volant.vms.create`, `volant.vms.get`, `volant.vms.delete` or
    `volant.system.get_capabilities`."""
    params: dict[str, Any] = {}
    """The parameters: `create` takes the body of `POST /api/v1/vms`, `get` and `delete` take `name`, `list` takes
    `status` (an array), `plugin` and `labels`, all optional."""


class CommandAnswer(msgspec.Struct, frozen=True):
    """The answer to a `Command`."""

    result: Any
    """The result of the REST route; null for `delete`, and after a failure."""
    error: str
    """The error; empty if the command succeeded."""


class Capabilities(msgspec.Struct, frozen=True):
    """The result of `volant.system.get_capabilities`."""

    version: str
    commands: list[str]
    plugins: list[str]
    """The plugins that new VMs may use."""
    mcp_versions: list[str]
    """The versions of the Model Context Protocol at the same URL."""


class _Listed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    status: list[Status] = []
    plugin: Name | None = None
    labels: dict[str, str] = {}


class _Named(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: Name


MCP_VERSIONS = ["2026-07-28", "2025-11-25", "2025-06-18"]


async def answer_command(call: ToolCall, table: Table, data: bytes) -> CommandAnswer:
    """Executes the command in a body; a failure is part of the answer."""
    try:
        command = decode(data, Command)
        known = COMMANDS.get(command.command)
        if known is None:
            raise invalid(
                "command", f"there is no command {command.command[:80]!r}", hint=f"use one of: {', '.join(COMMANDS)}"
            )
        operation, run = known
        async with acting(call, table[operation]):
            return CommandAnswer(await run(call, msgspec.json.encode(command.params)), "")
    except* Problem as group:
        problem = first_problem(group)
    return CommandAnswer(None, f"{problem.detail}; {problem.hint}" if problem.hint else problem.detail)


async def _list(call: ToolCall, params: bytes) -> object:
    wanted = decode(params, _Listed, "params")
    plugins = (wanted.plugin,) if wanted.plugin is not None else ()
    return (await vms.list_vms(call, status=wanted.status, plugin=plugins, labels=wanted.labels)).items


async def _create(call: ToolCall, params: bytes) -> object:
    body = decode(params, CreateVm, "params")
    name_target((), body)
    return (await vms.create_vm(call, body=body)).vm


async def _get(call: ToolCall, params: bytes) -> object:
    return (await vms.get_vm(call, decode(params, _Named, "params").name)).vm


async def _delete(call: ToolCall, params: bytes) -> object:
    name = decode(params, _Named, "params").name
    name_target((name,), None)
    await vms.delete_vm(call, name)
    return None


async def _capabilities(call: ToolCall, params: bytes) -> object:
    decode(params, Nothing, "params")
    plugins = [plugin.name for plugin in call.deps.store.projection.plugins_of(call.listed) if plugin.enabled]
    return Capabilities(__version__, list(COMMANDS), plugins, MCP_VERSIONS)


COMMANDS: Mapping[str, tuple[str, Callable[[ToolCall, bytes], Awaitable[object]]]] = {
    "volant.vms.list": ("list_vms", _list),
    "volant.vms.create": ("create_vm", _create),
    "volant.vms.get": ("get_vm", _get),
    "volant.vms.delete": ("delete_vm", _delete),
    "volant.system.get_capabilities": ("system_status", _capabilities),
}
"""Each command's operation, whose permission it needs, and its function, which takes the parameters as JSON."""
