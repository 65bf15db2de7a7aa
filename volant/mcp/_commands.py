"""The document's own form of `POST /api/v1/mcp`: `{"command": …, "params": {…}}`, answered by 200 in any case."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import msgspec

from volant import __version__
from volant.http import Nothing, decode
from volant.model import CreateVm, Name, Problem, Status, check_create, invalid, view
from volant.operations import chosen, vm_row

from ._tool import Asked
from ._wire import Command, CommandAnswer


class Capabilities(msgspec.Struct, frozen=True):
    """The result of `volant.system.get_capabilities`."""

    version: str
    commands: list[str]
    plugins: list[str]
    """Those that new VMs may use."""
    mcp_versions: list[str]
    """Of the Model Context Protocol, on the same URL."""


class _Listed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    status: list[Status] = []
    plugin: Name | None = None
    labels: dict[str, str] = {}


class _Named(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: Name


MCP_VERSIONS = ["2026-07-28", "2025-11-25", "2025-06-18"]


async def answer_command(asked: Asked, data: bytes) -> CommandAnswer:
    """Do what the command in a body says; a failure is told in the answer."""
    try:
        command = decode(data, Command)
        run = _COMMANDS.get(command.command)
        if run is None:
            raise invalid(
                "command", f"there is no command {command.command[:80]!r}", hint=f"there are {', '.join(_COMMANDS)}"
            )
        return CommandAnswer(await run(asked, msgspec.json.encode(command.params)), "")
    except Problem as problem:
        return CommandAnswer(None, f"{problem.detail}; {problem.hint}" if problem.hint else problem.detail)


async def _list(asked: Asked, params: bytes) -> object:
    wanted = decode(params, _Listed, "params")
    plugins = (wanted.plugin,) if wanted.plugin is not None else ()
    return [view(row) for row in chosen(asked.deps, states=wanted.status, plugins=plugins, labels=wanted.labels)]


async def _create(asked: Asked, params: bytes) -> object:
    wanted = decode(params, CreateVm, "params")
    check_create(wanted)
    return view(await asked.deps.vms.create(wanted))


async def _get(asked: Asked, params: bytes) -> object:
    return view(vm_row(asked.deps, decode(params, _Named, "params").name))


async def _delete(asked: Asked, params: bytes) -> object:
    name = vm_row(asked.deps, decode(params, _Named, "params").name).name
    await asked.until(partial(asked.deps.vms.delete, name))
    return None


async def _capabilities(asked: Asked, params: bytes) -> object:
    decode(params, Nothing, "params")
    plugins = [plugin.manifest.name for plugin in asked.deps.store.projection.plugins.values() if plugin.enabled]
    return Capabilities(__version__, list(_COMMANDS), plugins, MCP_VERSIONS)


_COMMANDS: Mapping[str, Callable[[Asked, bytes], Awaitable[object]]] = {
    "volant.vms.list": _list,
    "volant.vms.create": _create,
    "volant.vms.get": _get,
    "volant.vms.delete": _delete,
    "volant.system.get_capabilities": _capabilities,
}
