"""Plugins: kinds of VMs."""

from __future__ import annotations

import msgspec

from volant.journal import (
    EnablePlugin,
    InstallPlugin,
    Plugin,
    PluginChanged,
    PluginInstalled,
    RemovePlugin,
    ask_journal,
    plugin_view,
)
from volant.model import Manifest, PluginView, check_manifest, is_name, no_such_plugin

from ._artifacts import admit
from ._context import Context
from ._permission import Permission
from ._table import TABLE


class Enabled(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of `POST …/enabled`."""

    enabled: bool


@TABLE.operation("GET /api/v1/plugins", permission=Permission.VIEW, answer="All")
async def list_plugins(context: Context) -> list[PluginView]:
    """List plugins."""
    return [plugin_view(plugin) for plugin in context.deps.store.projection.plugins.values()]


@TABLE.operation(
    "POST /api/v1/plugins",
    permission=Permission.ADMIN,
    status=201,
    answer="Installed",
    errors=(503, 507),
    idempotent=True,
    client_timeout_s=900,
)
async def install_plugin(context: Context, *, body: Manifest) -> PluginInstalled:
    """Install a plugin from its manifest.

    `boot` may name files of the daemon's host by path: below a directory of the setting `artifact_dirs`; or, at a Unix
    socket, and without a key for the daemon's own user over loopback, what the client's user can read. These are taken
    into the cache before the answer. Else it is 403 `artifact-not-allowed` or 400 `artifact-unavailable`: send the file
    with `PUT /api/v1/artifacts/{sha256}`, then install the plugin.
    """
    manifest = check_manifest(body)
    await admit(context, manifest)
    return PluginInstalled.of(await ask_journal(context.deps.journal, InstallPlugin(manifest, context.key)))


@TABLE.operation("GET /api/v1/plugins/{name}", permission=Permission.VIEW, answer="The plugin")
async def get_plugin(context: Context, name: str) -> PluginView:
    """Get a plugin."""
    return plugin_view(_plugin(context, name))


@TABLE.operation("DELETE /api/v1/plugins/{name}", permission=Permission.ADMIN, answer="Removed", errors=(409, 503))
async def remove_plugin(context: Context, name: str) -> None:
    """Remove a plugin that no VM uses."""
    await ask_journal(context.deps.journal, RemovePlugin(_plugin_name(name)))


@TABLE.operation(
    "GET /api/v1/plugins/{name}/manifest", permission=Permission.VIEW, answer="The manifest", client="plugins.manifest"
)
async def get_manifest(context: Context, name: str) -> Manifest:
    """Get what a plugin was installed from."""
    return _plugin(context, name).manifest


@TABLE.operation(
    "POST /api/v1/plugins/{name}/enabled",
    permission=Permission.ADMIN,
    answer="The plugin",
    errors=(503,),
    idempotent=True,
)
async def enable_plugin(context: Context, name: str, *, body: Enabled) -> PluginChanged:
    """Let new VMs use a plugin, or not."""
    message = EnablePlugin(_plugin_name(name), body.enabled, context.key)
    return PluginChanged.of(await ask_journal(context.deps.journal, message))


def _plugin(context: Context, name: str) -> Plugin:
    plugin = context.deps.store.projection.plugins.get(name)
    if plugin is None:
        raise no_such_plugin(name)
    return plugin


def _plugin_name(name: str) -> str:
    """:raises Problem: 404 no plugin can have this name."""
    if not is_name(name):
        raise no_such_plugin(name)
    return name
