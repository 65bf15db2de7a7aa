"""The tool that tells what kinds of VMs there are."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from volant.model import Name
from volant.operations import no_such_plugin

from ._text import fitting
from ._tool import Asked, Result


class ListPlugins(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """All of them."""

    plugin: Name | None = None
    """Only this one."""


class PluginAction(msgspec.Struct, frozen=True):
    """Something that a plugin's workload does when asked."""

    name: str
    description: str
    input: dict[str, Any] | None
    """JSON Schema of what vms_call_action takes as `input`; null when the plugin does not say."""


class PluginSummary(msgspec.Struct, frozen=True):
    """A kind of VM."""

    name: str
    description: str
    version: str
    enabled: bool
    """Whether new VMs may use it."""
    memory_mb: int
    """What its VMs need at least."""
    actions: list[PluginAction]


class PluginList(msgspec.Struct, frozen=True):
    """Kinds of VMs."""

    plugins: list[PluginSummary]
    left_out: int
    """How many did not fit; ask for them by name."""


async def list_plugins(asked: Asked, wanted: ListPlugins) -> Result:
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
        for plugin in asked.deps.store.projection.plugins.values()
        if wanted.plugin in (None, plugin.manifest.name)
    ]
    if wanted.plugin is not None and not found:
        raise no_such_plugin(wanted.plugin)
    page = fitting(found)
    await trio.lowlevel.checkpoint()
    return Result(PluginList(page, len(found) - len(page)))
