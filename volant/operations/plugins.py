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
from volant.model import Key, Manifest, Permission, PluginView, check_manifest, is_name, no_such_plugin

from ._artifacts import admit, check_every_host_has
from ._context import Context
from ._images import admit_image
from ._table import TABLE


class Enabled(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of `POST …/enabled`."""

    enabled: bool


@TABLE.operation("GET /api/v1/plugins", permission=Permission.VIEW, answer="All")
async def list_plugins(context: Context) -> list[PluginView]:
    """List plugins."""
    return [plugin_view(plugin) for plugin in context.deps.store.projection.plugins_of(context.listed)]


@TABLE.operation(
    "POST /api/v1/plugins",
    permission=Permission.CONTROL,
    status=201,
    answer="Installed",
    errors=(404, 503, 507),
    idempotent=True,
    client_timeout_s=900,
    journaled=True,
    examples={
        "A web server": {
            "name": "files",
            "description": "Serves its files",
            "workload": {"entrypoint": ["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/srv"], "port": 8080},
        }
    },
)
async def install_plugin(context: Context, *, body: Manifest) -> PluginInstalled:
    """Install a plugin from its manifest.

    For administrators `boot` may name files of the daemon's host by path: below a directory of the setting
    `artifact_dirs`; or, at a Unix socket, and without a key for the daemon's own user over loopback, what the client's
    user can read. These are taken into the cache before the answer. Else it is 403 `artifact-not-allowed` or 400
    `artifact-unavailable`: send the file with `PUT /api/v1/artifacts/{sha256}`, then install the plugin. For an OCI
    image in a file of the host, `boot.image` follows the rules of `image` for a new VM. A plugin of a fleet names no
    files: 422 `file-of-one-host`.
    """
    manifest = check_manifest(body)
    if context.deps.fleet is not None:
        check_every_host_has(manifest)
    await admit(context, manifest)
    if manifest.image is not None:
        await admit_image(context, manifest.image.reference, "boot.image.reference")
    message = InstallPlugin(manifest, context.project, context.key)
    return PluginInstalled.of(await ask_journal(context.deps.journal, message))


@TABLE.operation("GET /api/v1/plugins/{name}", permission=Permission.VIEW, answer="The plugin")
async def get_plugin(context: Context, name: str) -> PluginView:
    """Get a plugin."""
    return plugin_view(_plugin(context, name))


@TABLE.operation(
    "DELETE /api/v1/plugins/{name}", permission=Permission.CONTROL, answer="Deleted", errors=(409, 503), journaled=True
)
async def delete_plugin(context: Context, name: str) -> None:
    """Delete a plugin that no VM uses."""
    await ask_journal(context.deps.journal, RemovePlugin(_key_of(context, name)))


@TABLE.operation(
    "GET /api/v1/plugins/{name}/manifest", permission=Permission.VIEW, answer="The manifest", client="plugins.manifest"
)
async def get_manifest(context: Context, name: str) -> Manifest:
    """Get what a plugin was installed from."""
    return _plugin(context, name).manifest


@TABLE.operation(
    "POST /api/v1/plugins/{name}/enabled",
    permission=Permission.CONTROL,
    answer="The plugin",
    errors=(503,),
    idempotent=True,
    journaled=True,
    examples={"Disable": {"enabled": False}},
)
async def enable_plugin(context: Context, name: str, *, body: Enabled) -> PluginChanged:
    """Let new VMs use a plugin, or not."""
    message = EnablePlugin(_key_of(context, name), body.enabled, context.key)
    return PluginChanged.of(await ask_journal(context.deps.journal, message))


def _plugin(context: Context, name: str) -> Plugin:
    plugin = context.deps.store.projection.plugin(context.named(name))
    if plugin is None:
        raise no_such_plugin(name)
    return plugin


def _key_of(context: Context, name: str) -> Key:
    """:raises Problem: 404 no plugin can have this name."""
    if not is_name(name):
        raise no_such_plugin(name)
    return context.named(name)
