"""Plugins, which define kinds of VMs."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from volant import images, oci
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
from volant.model import (
    Artifact,
    Key,
    Manifest,
    Permission,
    PluginView,
    Problem,
    check_manifest,
    is_name,
    no_such_plugin,
)

from ._context import Context
from ._images import admit_image, may_name
from ._table import TABLE


class Enabled(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of `POST …/enabled`."""

    enabled: bool


@TABLE.operation("GET /api/v1/plugins", permission=Permission.VIEW, answer="The plugins")
async def list_plugins(context: Context) -> list[PluginView]:
    """List plugins."""
    return [plugin_view(plugin) for plugin in context.deps.store.projection.plugins_of(context.listed)]


@TABLE.operation(
    "POST /api/v1/plugins",
    permission=Permission.CONTROL,
    status=201,
    answer="The plugin",
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

    `boot` names files by URL or by path. Administrators may name files of the daemon's host by path, below a directory
    of the setting `artifact_dirs`; they are read when a VM boots. Other paths get 403 `artifact-not-allowed`: send the
    file with `PUT /api/v1/artifacts/{sha256}`, then install the plugin. An OCI image in a file of the host must be
    below `artifact_dirs`, too. A plugin of a fleet can't name files: 422 `file-of-one-host`.
    """
    manifest = check_manifest(body)
    if context.deps.fleet is not None:
        _check_every_host_has(manifest)
    await _check_files(context, manifest)
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
    """Get the manifest of a plugin."""
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
    """Allow or forbid new VMs to use a plugin."""
    message = EnablePlugin(_key_of(context, name), body.enabled, context.key)
    return PluginChanged.of(await ask_journal(context.deps.journal, message))


def _plugin(context: Context, name: str) -> Plugin:
    plugin = context.deps.store.projection.plugin(context.named(name))
    if plugin is None:
        raise no_such_plugin(name)
    return plugin


def _key_of(context: Context, name: str) -> Key:
    """Returns the key of a plugin. :raises Problem: 404, no plugin can have this name."""
    if not is_name(name):
        raise no_such_plugin(name)
    return context.named(name)


def _check_every_host_has(manifest: Manifest) -> None:
    """Checks that a manifest names nothing that only this host has. :raises Problem: 422 a file"""
    boot = manifest.boot
    named: dict[str, bool] = {}
    for name in ("kernel", "initramfs", "rootfs"):
        artifact: Artifact | None = getattr(boot, name, None)
        named[f"boot.{name}.url"] = artifact is not None and images.local_path(artifact.url) is not None
    if manifest.image is not None:
        with suppress(oci.OciError):
            named["boot.image.reference"] = not oci.parse_reference(manifest.image.reference).registry
    for field, is_file in named.items():
        if is_file:
            raise Problem(
                422, "file-of-one-host", f"{field} is a file of this host, and all hosts of the fleet have the plugin",
                field=field, hint="serve the file over HTTPS, or push the image to a registry",
            )  # fmt: skip


async def _check_files(context: Context, manifest: Manifest) -> None:
    """Checks that a client may name the files of this host that a manifest names. The daemon can read more than its
    clients. So administrators name files below `artifact_dirs`, and everybody what is in the cache by its digest.

    :raises Problem: 403 it may not name one
    """
    if manifest.boot is None:
        return
    for name in ("kernel", "initramfs", "rootfs"):
        artifact: Artifact | None = getattr(manifest.boot, name)
        path = None if artifact is None else images.local_path(artifact.url)
        if artifact is None or path is None or may_name(context, path):
            continue
        if not await context.deps.vms.artifacts.has(artifact):
            raise Problem(
                403, "artifact-not-allowed",
                f"boot.{name}.url is a path of the daemon's host, and this client may not name it",
                field=f"boot.{name}.url",
                hint="upload the file with `volar plugins upload`, or put it below a directory of artifact_dirs",
            )  # fmt: skip
