"""`/api/v1/plugins`: what kinds of VMs there are."""

from __future__ import annotations

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from volant.http import Access, Nothing, empty_response, json_response, read_body
from volant.journal import Answer, EnablePlugin, InstallPlugin, Once, Plugin, RemovePlugin
from volant.model import Manifest, PluginView, Problem, check_manifest
from volant.operations import ApiDeps, ask_journal

from ._artifacts import admit
from ._idempotency import Repeats, answer_of
from ._params import no_query, plugin_name


class Enabled(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The body of `POST …/enabled`."""

    enabled: bool


def add_routes(app: QuartTrio, deps: ApiDeps, repeats: Repeats, access: Access) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/plugins")
    async def list_plugins() -> Response:
        no_query()
        return json_response([_shown(plugin) for plugin in deps.store.projection.plugins.values()])

    @app.post("/api/v1/plugins")
    async def install_plugin() -> Response:
        no_query()
        manifest = check_manifest(await read_body(Manifest))

        async def install(once: Once | None) -> Plugin:
            await admit(deps, access, request.scope, manifest)
            return await ask_journal(deps, InstallPlugin(manifest, once))

        return (await repeats.answer(manifest, install, _installed)).response()

    @app.get("/api/v1/plugins/<name>")
    async def get_plugin(name: str) -> Response:
        no_query()
        return json_response(_shown(plugin_of(name)))

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

        async def enable(once: Once | None) -> Plugin:
            return await ask_journal(deps, EnablePlugin(plugin_name(name), wanted.enabled, once))

        return (await repeats.answer(wanted, enable, _seen)).response()

    def plugin_of(name: str) -> Plugin:
        plugin = deps.store.projection.plugins.get(name)
        if plugin is None:
            raise Problem(404, "plugin-not-found", f"there is no plugin named {name[:80]!r}")
        return plugin


def _seen(plugin: Plugin) -> Answer:
    return answer_of(_shown(plugin))


def _installed(plugin: Plugin) -> Answer:
    return answer_of(_shown(plugin), 201, Location=f"/api/v1/plugins/{plugin.name}")


def _shown(plugin: Plugin) -> PluginView:
    manifest = plugin.manifest
    return PluginView(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        runtime=manifest.runtime,
        enabled=plugin.enabled,
        builtin=plugin.created_at is None,
        created_at=plugin.created_at,
        labels=manifest.labels,
    )
