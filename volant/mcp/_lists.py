"""Tools that list networks, snapshots, secrets and plugins, without pages, as there are usually few."""

from __future__ import annotations

from typing import Any

import msgspec
import trio
from msgspec import UNSET

from volant.model import Name, NetworkView, SecretView, SnapshotView, no_such_network, no_such_plugin
from volant.operations import shown_networks, snapshots

from ._text import fitting
from ._tool import MissingHosts, Result, ToolCall, missing_hosts, tool


class ListNetworks(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The networks to list: all, or one."""

    network: Name | None = None
    """Only this one."""


class NetworkList(msgspec.Struct, frozen=True):
    """Networks, by name."""

    networks: list[NetworkView]
    left_out: int
    """The number of networks that did not fit; ask for them by name."""


@tool(
    "networks_list",
    "List networks",
    "List the networks in which VMs reach each other by name, with their VMs and addresses.",
    operation="list_networks",
    read_only=True,
)
async def list_networks(call: ToolCall, wanted: ListNetworks) -> Result[NetworkList]:
    projection = call.deps.store.projection
    await trio.lowlevel.checkpoint()
    found = [one for one in shown_networks(projection, call.listed) if wanted.network in (None, one.name)]
    if wanted.network is not None and not found:
        raise no_such_network(wanted.network)
    page = fitting(found)
    return Result(NetworkList(page, len(found) - len(page)))


class ListSnapshots(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The snapshots to list."""

    vm: Name | None = None
    """Only snapshots of VMs with this name, including deleted ones."""


class SnapshotList(msgspec.Struct, frozen=True):
    """Snapshots, newest first."""

    snapshots: list[SnapshotView]
    left_out: int
    """The number of older snapshots that did not fit."""
    missing_hosts: MissingHosts = UNSET


@tool(
    "snapshots_list",
    "List snapshots",
    "List the snapshots that were taken with vms_snapshot, newest first.",
    operation="list_snapshots",
    read_only=True,
)
async def list_snapshots(call: ToolCall, wanted: ListSnapshots) -> Result[SnapshotList]:
    found = [one for one in await snapshots.list_snapshots(call) if wanted.vm in (None, one.vm)][::-1]
    shown = fitting(found)
    return Result(SnapshotList(shown, len(found) - len(shown), missing_hosts(call)))


class ListSecrets(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The secrets to list: all."""


class SecretList(msgspec.Struct, frozen=True):
    """Secrets, by name."""

    secrets: list[SecretView]
    left_out: int
    """The number of secrets that did not fit."""


@tool(
    "secrets_list",
    "List secrets",
    'List the names of the secrets that vms_create can pass to a VM, in `env` as `{"secret": NAME}` or in `secrets` as '
    "the file /run/secrets/NAME. You can't read or set their values; ask a person to run `volar secrets set NAME`.",
    operation="list_secrets",
    read_only=True,
)
async def list_secrets(call: ToolCall, wanted: ListSecrets) -> Result[SecretList]:
    del wanted
    found = await call.deps.vms.secrets.views(call.listed)
    shown = fitting(found)
    return Result(SecretList(shown, len(found) - len(shown)))


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
