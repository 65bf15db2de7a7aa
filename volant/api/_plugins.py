"""`/api/v1/plugins`: what kinds of VMs there are."""

from __future__ import annotations

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from volant.http import Access, Nothing, empty_response, json_response, read_body
from volant.journal import (
    EnablePlugin,
    IdempotencyKey,
    InstallPlugin,
    Plugin,
    PluginChanged,
    PluginInstalled,
    RemovePlugin,
    plugin_view,
)
from volant.model import Manifest, Problem, check_manifest
from volant.operations import ApiDeps, ask_journal

from ._artifacts import admit
from ._idempotency import Repeats
from ._params import no_query, plugin_name
from ._results import respond


class Enabled(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of `POST …/enabled`."""

    enabled: bool


def add_routes(app: QuartTrio, deps: ApiDeps, repeats: Repeats, access: Access) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/plugins")
    async def list_plugins() -> Response:
        no_query()
        return json_response([plugin_view(plugin) for plugin in deps.store.projection.plugins.values()])

    @app.post("/api/v1/plugins")
    async def install_plugin() -> Response:
        no_query()
        manifest = check_manifest(await read_body(Manifest))

        async def install(key: IdempotencyKey | None) -> PluginInstalled:
            await admit(deps, access, request.scope, manifest)
            return PluginInstalled.of(await ask_journal(deps, InstallPlugin(manifest, key)))

        return respond(await repeats.run(manifest, install))

    @app.get("/api/v1/plugins/<name>")
    async def get_plugin(name: str) -> Response:
        no_query()
        return json_response(plugin_view(plugin_of(name)))

    @app.delete("/api/v1/plugins/<name>")
    async def remove_plugin(name: str) -> Response:
        no_query()
        await read_body(Nothing)
        await ask_journal(deps, RemovePlugin(plugin_name(name)))
        return empty_response(204)

    @app.get("/api/v1/plugins/<name>/manifest")
    async def get_manifest(name: str) -> Response:
        no_query()
        return json_response(plugin_of(name).manifest)

    @app.post("/api/v1/plugins/<name>/enabled")
    async def enable_plugin(name: str) -> Response:
        no_query()
        wanted = await read_body(Enabled)

        async def enable(key: IdempotencyKey | None) -> PluginChanged:
            return PluginChanged.of(await ask_journal(deps, EnablePlugin(plugin_name(name), wanted.enabled, key)))

        return respond(await repeats.run(wanted, enable))

    def plugin_of(name: str) -> Plugin:
        plugin = deps.store.projection.plugins.get(name)
        if plugin is None:
            raise Problem(404, "plugin-not-found", f"there is no plugin named {name[:80]!r}")
        return plugin
