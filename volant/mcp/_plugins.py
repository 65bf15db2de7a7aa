"""The tool that lists plugins with their actions."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from volant.model import Name, no_such_plugin

from ._text import fitting
from ._tool import Result, ToolCall, tool


class ListPlugins(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The plugins to list: all, or one."""

    plugin: Name | None = None
    """Only this one."""


class PluginAction(msgspec.Struct, frozen=True):
    """An action of a plugin's workload."""

    name: str
    description: str
    input: dict[str, Any] | None
    """The JSON Schema of `input` of vms_call_action; null if the plugin declares none."""


class PluginSummary(msgspec.Struct, frozen=True):
    """A kind of VM."""

    name: str
    description: str
    version: str
    enabled: bool
    """Whether new VMs may use it."""
    memory_mb: int
    """The minimum memory of its VMs."""
    actions: list[PluginAction]


class PluginList(msgspec.Struct, frozen=True):
    """The plugins, each a kind of VM."""

    plugins: list[PluginSummary]
    left_out: int
    """The number of plugins that did not fit; ask for them by name."""


@tool(
    "plugins_list",
    "List plugins",
    "List the kinds of VMs that vms_create can create (`plugin`), and the actions that vms_call_action can call.",
    operation="list_plugins",
    read_only=True,
)
async def list_plugins(call: ToolCall, wanted: ListPlugins) -> Result[PluginList]:
    found = [
        PluginSummary(
            name=plugin.manifest.name,
            description=plugin.manifest.description,
            version=plugin.manifest.version,
            enabled=plugin.enabled,
            memory_mb=plugin.manifest.resources.memory_mb,
            actions=[
                PluginAction(name, action.description, action.input) for name, action in plugin.manifest.actions.items()
            ],
        )
        for plugin in call.deps.store.projection.plugins_of(call.listed)
        if wanted.plugin in (None, plugin.manifest.name)
    ]
    if wanted.plugin is not None and not found:
        raise no_such_plugin(wanted.plugin)
    page = fitting(found)
    await trio.lowlevel.checkpoint()
    return Result(PluginList(page, len(found) - len(page)))
