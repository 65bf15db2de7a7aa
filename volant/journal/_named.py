"""Named objects other than VMs: plugins, snapshots, networks, volumes, secrets and projects. All are
stored, staged and published alike."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from volant.model import (
    BASE,
    DEFAULT_PROJECT,
    Key,
    Manifest,
    Network,
    PluginView,
    Project,
    Secret,
    Snapshot,
    Volume,
    is_name,
)
from volant.model.stored import (
    BadMember,
    check_stored_egress,
    check_stored_network,
    check_stored_plugin,
    check_stored_secret,
    check_stored_snapshot,
    check_stored_time,
    check_stored_volume,
)


class Plugin(msgspec.Struct, frozen=True):
    """An installed plugin. `base` is built in, belongs to every project and has no `created_at`."""

    manifest: Manifest
    enabled: bool = True
    created_at: datetime | None = None
    project: str = DEFAULT_PROJECT

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def key(self) -> Key:
        """Finds it by name."""
        return Key(self.project, self.name)


def built_in(key: Key) -> Plugin | None:
    """Returns the plugin that every project has, if that is the key of it."""
    return Plugin(BASE, project=key.project) if key.name == BASE.name else None


def plugin_view(plugin: Plugin) -> PluginView:
    """Returns what clients see of `plugin`."""
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
        project=plugin.project,
    )


def default_project(key: Key) -> Project | None:
    """Returns the project that always exists, if that is the key of it."""
    return Project(name=DEFAULT_PROJECT) if key.name == DEFAULT_PROJECT else None


Named = Plugin | Snapshot | Network | Volume | Project | Secret


class Kind(msgspec.Struct, frozen=True):
    """A kind of named object."""

    word: str
    """In the database."""
    type: type[Any]
    check: Callable[[Any], None]
    """:raises BadMember: volantd can't have stored it."""

    def decode(self, data: bytes) -> Any:
        """:raises msgspec.MsgspecError: it is none of this kind."""
        return msgspec.json.decode(data, type=self.type)


def _check_plugin(plugin: Plugin) -> None:
    if not is_name(plugin.project):
        raise BadMember("project", plugin.project, "which is no name")
    check_stored_plugin(plugin.manifest)
    check_stored_time("created_at", plugin.created_at)


def _check_project(project: Project) -> None:
    if not is_name(project.name):
        raise BadMember("name", project.name, "which is no name")
    check_stored_egress(project.egress)
    check_stored_time("created_at", project.created_at)


KINDS = {
    kind.type: kind
    for kind in (
        Kind("plugin", Plugin, _check_plugin),
        Kind("snapshot", Snapshot, check_stored_snapshot),
        Kind("network", Network, check_stored_network),
        Kind("volume", Volume, check_stored_volume),
        Kind("project", Project, _check_project),
        Kind("secret", Secret, check_stored_secret),
    )
}
KINDS_BY_WORD = {kind.word: kind for kind in KINDS.values()}
